"""What attacks in `attacks/` put to use: matching, putting a network together again, fitting masks."""

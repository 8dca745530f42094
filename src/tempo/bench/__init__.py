"""Measures protected against plain training, side by side in one run."""

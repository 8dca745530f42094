"""What a run of LoRA under scheme `split` would take, on hardware that is not here: docs/plan.md."""

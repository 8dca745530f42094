"""Fine-tuning a public language model on private text by LoRA: what `tempo finetune` does."""

"""What stays in the trusted process, computed in less time: the same functions as PyTorch's, to rounding."""

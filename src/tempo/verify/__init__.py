"""Checks of workers' answers: Freivalds with secret Gaussian vectors, on masked tensors, in O(elements)."""

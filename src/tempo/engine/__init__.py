"""Turns layer calls into requests to workers: placement, products, links, autograd."""

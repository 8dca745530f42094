"""The untrusted server: stores masked tensors, multiplies, differentiates, forgets.

Imports nothing of ours but `tempo.wire`, `tempo.kernels` and `tempo.errors`, so that no code that holds a key is ever
loaded here.
"""

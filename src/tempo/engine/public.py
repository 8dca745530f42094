"""Weights that are public: those that were frozen when their model was protected as a public one, by content."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class PublicWeights:
    """Tells whether a weight may be sent as it is.

    By content, not by name: adapters that are merged into a frozen weight change it, and through ``.data`` no version
    counter tells.
    """

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def add(self, weight: Tensor) -> None:
        """Take note of a public weight."""
        self._digests.add(_digest(weight))

    def holds(self, weight: Tensor) -> bool:
        """Whether it is one of these, be it transposed or flattened."""
        return _digest(weight) in self._digests


def _digest(weight: Tensor) -> bytes:
    """SHA-256 of dtype and elements, in the order in which they lie in memory where they lie without gaps."""
    weight = weight.detach()
    transposed = weight.dim() == 2 and not weight.is_contiguous()
    flat = (weight.t() if transposed else weight).contiguous().view(-1)
    content = hashlib.sha256(str(flat.dtype).encode())
    content.update(flat.view(torch.uint8).numpy().data)
    return content.digest()

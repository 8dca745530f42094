"""Weights that are public: those that were frozen when their model was protected as a public one, by content."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from tempo.engine.fingerprint import Fingerprint


class PublicWeights:
    """Tells whether a weight may be sent as it is.

    By content, not by name: adapters that are merged into a frozen weight change it, and through ``.data`` no version
    counter tells.
    """

    def __init__(self) -> None:
        self._digests: set[bytes] = set()
        self._seen: dict[tuple[object, ...], Fingerprint] = {}

    def add(self, weight: Tensor) -> None:
        """Take note of a public weight."""
        self._digests.add(_digest(weight))

    def holds(self, weight: Tensor) -> bool:
        """Whether it is one of these, be it transposed or flattened: looked at each time, thoroughly if it changed."""
        place, found = _place(weight), Fingerprint(weight)
        if self._seen.get(place) == found:
            return True
        if _digest(weight) not in self._digests:
            return False
        self._seen[place] = found
        return True

    def fingerprint(self, weight: Tensor) -> Fingerprint:
        """As it was when `holds` last found it public, the same object until it changes."""
        seen = self._seen.get(_place(weight))
        return Fingerprint(weight) if seen is None else seen


def _place(weight: Tensor) -> tuple[object, ...]:
    """The same for a kernel and its taps flattened."""
    return weight.data_ptr(), len(weight), weight.numel(), weight.dtype


def _digest(weight: Tensor) -> bytes:
    """SHA-256 of dtype and elements, in the order in which they lie in memory where they lie without gaps."""
    weight = weight.detach()
    transposed = weight.dim() == 2 and not weight.is_contiguous()
    flat = (weight.t() if transposed else weight).contiguous().view(-1)
    content = hashlib.sha256(str(flat.dtype).encode())
    content.update(flat.view(torch.uint8).numpy().data)
    return content.digest()

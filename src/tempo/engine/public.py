"""Weights that are public, by content: what was frozen when its model was protected as a public one, or was known."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from tempo.engine.fingerprint import Fingerprint


class PublicWeights:
    """Tells whether workers may know a weight as it is.

    By content, not by name: adapters that are merged into a frozen weight change it, and through ``.data`` no version
    counter tells.
    """

    def __init__(self) -> None:
        self._declared: set[bytes] = set()
        self._known: set[bytes] = set()
        self._unknown: set[bytes] = set()
        self._seen: dict[tuple[object, ...], Fingerprint] = {}

    def add(self, weight: Tensor) -> None:
        """Take note of a weight that the user said is public."""
        self._declared.add(_digest(weight))

    def sought(self, weight: Tensor, found: bool) -> None:
        """Take note of a weight that all workers have already, or not: nobody said that it may be sent."""
        (self._known if found else self._unknown).add(_digest(weight))

    def may_be_sent(self, weight: Tensor) -> bool:
        """Whether the user said that it is public. Workers may only claim to have the others that are."""
        return _digest(weight) in self._declared

    def holds(self, weight: Tensor) -> bool:
        """Whether it is one of these, be it transposed or flattened: looked at each time, thoroughly if it changed."""
        place, found = _place(weight), Fingerprint(weight)
        if self._seen.get(place) == found:
            return True
        digest = _digest(weight)
        if digest not in self._declared and digest not in self._known:
            return False
        self._seen[place] = found
        return True

    def why_not(self, weight: Tensor) -> str:
        """Why a weight is none of these."""
        if _digest(weight) in self._unknown:
            return "not every worker has its weight in a --base of its own (base='public' sends it)"
        return "its weight is not the one that was protected as public (adapters merged into it, another dtype?)"

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

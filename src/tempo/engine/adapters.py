"""Adapters beside the members of a product: computed here, all of one input at once, and added as it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tempo.schemes.low_rank import LowRank, adapter_dtype, times_vectors, weighted_sums


@dataclass(frozen=True, slots=True)
class Adapter:
    """``scale (x Aᵀ) Bᵀ``, to be added to a layer's output.

    Attributes:
        a: (r, d).
        b: (m, r).
        scale: A number.
    """

    a: Tensor
    b: Tensor
    scale: float


class Operands(NamedTuple):
    """What a layer multiplies its input by, and adds: the weight has output features first."""

    weight: Tensor
    bias: Tensor | None = None
    adapter: Adapter | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        of_adapter = () if self.adapter is None else (self.adapter.a, self.adapter.b)
        return [t for t in (self.weight, self.bias, *of_adapter) if t is not None]


class Adapters:
    """Those of one call's members, as they were then.

    Args:
        members: One for each member, or None.
        dtype: Of the call's input.
    """

    def __init__(self, members: Sequence[Adapter | None], dtype: torch.dtype) -> None:
        self._dtype = adapter_dtype(dtype)
        self._ranks = [0 if m is None else len(m.a) for m in members]
        self._scales = [0.0 if m is None else m.scale for m in members]
        self._a = torch.cat([m.a.detach().to(self._dtype) for m in members if m is not None])
        self._ups = [None if m is None else (m.b.detach().to(self._dtype) * m.scale).t().contiguous() for m in members]
        self._low: Tensor | None = None

    def added(self, x: Tensor) -> list[LowRank | None]:
        """What each member's output gets for the call's input ``x``."""
        if self._low is None:
            self._low = x.new_empty(len(x), len(self._a), dtype=self._dtype)
            times_vectors(x, self._a, self._low)
        parts = self._low.split(self._ranks, 1)
        return [None if up is None else LowRank(low, up) for low, up in zip(parts, self._ups, strict=True)]

    def differentiate(
        self,
        x: Callable[[], Tensor],
        gradients: Sequence[Tensor | None],
        needs_x: bool,
        needs_a: Sequence[bool],
        needs_b: Sequence[bool],
    ) -> tuple[LowRank | None, list[Tensor | None], list[Tensor | None]]:
        """Go back from the outputs' ``gradients``, one at least; None is one of zeros.

        Args:
            x: Recalls the input.
            gradients: Of each member's output.
            needs_x: Whether the input's gradient is wanted.
            needs_a: And that of each member's ``a``.
            needs_b: And of its ``b``.

        Returns:
            What the gradient of the input gets, and the gradients of all ``a`` and ``b``: what is wanted of them.
        """
        assert self._low is not None  # noqa: S101 - outputs were made of it
        of_a: list[Tensor | None] = [None] * len(gradients)
        of_b: list[Tensor | None] = [None] * len(gradients)
        for member, (g, low) in enumerate(zip(gradients, self._low.split(self._ranks, 1), strict=True)):
            if g is not None and needs_b[member]:
                of_b[member] = weighted_sums(g, low).t() * self._scales[member]
        if not (needs_x or any(needs_a)):
            return None, of_a, of_b
        dlow = torch.zeros_like(self._low)
        for g, up, part in zip(gradients, self._ups, dlow.split(self._ranks, 1), strict=True):
            if g is not None and up is not None:
                times_vectors(g, up, part)
        if any(needs_a):
            of_a = list(torch.split(weighted_sums(x(), dlow), self._ranks))
        return LowRank(dlow, self._a), of_a, of_b

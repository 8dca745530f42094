"""The null worker: answers at once, with finite numbers that mean nothing. For benchmarks of the trusted side."""

from __future__ import annotations

from typing import Final, final

import torch
from torch import Tensor

from tempo.wire.messages import Product, Rule
from tempo.worker.budget import Account
from tempo.worker.compute import Compute, Incoming, Kept

_RESIDUES: Final = 1 << 25
"""As large as sums are where rows and weight have a thousand features."""


@final
class NullCompute(Compute):
    """No arithmetic and no copies.

    Each place an answer goes to is filled once with small numbers, and again only for another dtype or more of it.
    """

    description = "null (answers mean nothing)"

    def __init__(self) -> None:
        self._filled: dict[int, tuple[torch.dtype, int]] = {}

    def keep(self, incoming: Incoming, account: Account) -> Kept:
        """Only the shape."""
        if incoming.block is not None:
            account.pool.give(incoming.block)
        shape_only = torch.empty(incoming.tensor.shape, dtype=incoming.tensor.dtype, device="meta")
        return Kept(shape_only, lambda: None)

    def zeros(self, like: Tensor, account: Account) -> Kept:
        """Only the shape."""
        return Kept(torch.empty_like(like), lambda: None)

    def expand(self, seed: bytes, out: Tensor) -> None:
        """Nothing."""

    def forward(self, product: Product, x: Tensor, w: Tensor, out: Tensor) -> None:
        """Something."""
        self.fill(out)

    def input_gradient(self, product: Product, g: Tensor, w: Tensor, out: Tensor) -> None:
        """Something."""
        self.fill(out)

    def weight_gradient(self, product: Product, g: Tensor, x: Tensor, out: Tensor) -> None:
        """Something."""
        self.fill(out)

    def accumulate(self, product: Product, g: Tensor, x: Tensor, gradient: Tensor) -> None:
        """Instant."""

    def update(self, rule: Rule, scale: float, w: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        """Instant."""

    def fetch(self, kept: Tensor, out: Tensor) -> None:
        """Something."""
        self.fill(out)

    def norm(self, kept: Tensor, out: Tensor) -> None:
        """Something, of a length's sign."""
        self.fill(out)
        out.abs_()

    def probe(self, size: int) -> None:
        """Instant."""

    def fill(self, out: Tensor) -> None:
        """Small numbers, unless they are there already."""
        dtype, extent = self._filled.get(out.data_ptr(), (out.dtype, 0))
        if dtype != out.dtype or extent < out.nbytes:
            if out.is_floating_point():
                out.uniform_(-0.01, 0.01)
            elif out.dtype == torch.int32:
                out.random_(-_RESIDUES, _RESIDUES)
            else:
                out.zero_()
            self._filled[out.data_ptr()] = (out.dtype, out.nbytes)

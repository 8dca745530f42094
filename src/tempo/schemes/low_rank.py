"""What adapters and cloaks add to a matrix, ``low @ up`` of a small rank; products of a tall matrix with few vectors.

Natively in one read of the tall matrix (`native/low_rank.h`), and else in PyTorch: the same but for rounding. All is
computed in float32, of matrices in bfloat16 too; of float64 in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempo import kernels


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix (T, m) as a product, to be added to another.

    Attributes:
        low: (T, r).
        up: (r, m), of the same dtype.
    """

    low: Tensor
    up: Tensor

    def of_rows(self, rows: slice) -> LowRank:
        """Some of its rows."""
        return LowRank(self.low[rows], self.up)

    def add_to(self, y: Tensor) -> None:
        """Add it to ``y`` (T, m), in place."""
        if y.dtype == self.up.dtype:
            y.addmm_(self.low, self.up)
        else:
            y.copy_(torch.addmm(y.to(self.up.dtype), self.low, self.up))


def add_all(outs: Sequence[Tensor], added: Sequence[LowRank | None]) -> None:
    """Add to each of ``outs`` what belongs to it, in place; nothing, if ``added`` is empty."""
    for out, one in zip(outs, added, strict=bool(added)):
        if one is not None:
            one.add_to(out)


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of adapters with matrices of ``dtype`` are computed in."""
    return torch.promote_types(dtype, torch.float32)


def times_vectors(x: Tensor, vectors: Tensor, out: Tensor) -> None:
    """Write ``x vectorsᵀ``.

    Args:
        x: (T, d).
        vectors: (r, d), contiguous, in `adapter_dtype`.
        out: (T, r), its rows contiguous, of the same dtype.
    """
    native = kernels.native()
    if native is None or not _in_reach(x):
        out.copy_(x.to(vectors.dtype) @ vectors.t())
        return

    def part(rows: slice) -> None:
        native.tall_products(x[rows], vectors, out[rows], None, None)

    kernels.rows_in_parts(part, *x.shape)


def weighted_sums(x: Tensor, weights: Tensor) -> Tensor:
    """``weightsᵀ x``.

    Args:
        x: (T, d).
        weights: (T, r), its rows contiguous, in `adapter_dtype`.

    Returns:
        (r, d), of the same dtype.
    """
    native = kernels.native()
    if native is None or not _in_reach(x):
        return weights.t() @ x.to(weights.dtype)
    sums: dict[int, Tensor] = {}

    def part(rows: slice) -> None:
        sums[rows.start] = of_part = weights.new_empty(weights.shape[1], x.shape[1])
        native.tall_products(x[rows], None, None, weights[rows], of_part)

    kernels.rows_in_parts(part, *x.shape)
    total = sums.pop(0)
    for first in sorted(sums):  # in one order, whichever thread was first
        total += sums[first]
    return total


def watched() -> bool:
    """Whether somebody watches PyTorch's operators, to count products say: adapters' are then computed by these."""
    return torch._C._len_torch_dispatch_stack() > 0


def _in_reach(x: Tensor) -> bool:
    """Whether kernels take ``x``."""
    return not watched() and x.dtype in kernels.DTYPES and x.numel() > 0 and (x.stride(1) == 1 or x.shape[1] <= 1)

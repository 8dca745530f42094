"""Exact sums mod p of rows of residues with secret vectors: what Freivalds' check of scheme `split` is made of.

For a wrong product and a vector that is uniform mod p the two sides of ``Y r = X (Wᵀ r)`` agree with probability 1/p
(Freivalds, IFIP 1977), for `VECTORS` of them with p^-2, below 2^-63; nothing is rounded, so nothing is tolerated.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tempo import kernels
from tempo.wire.residues import reduce_

VECTORS: Final = 2

_ROWS: Final = 1 << 18
"""Elements that PyTorch sums at a time: spread into limbs they stay in a core's cache."""


def row_sums(x: Tensor, vectors: Tensor) -> Tensor:
    """``x v mod p`` of int32 residues ``x`` (T, d) and ``vectors`` (k, d): int64 residues (T, k)."""
    if native := kernels.native():
        x, sums = x.contiguous(), torch.empty(len(x), len(vectors), dtype=torch.int64)

        def part(rows: slice) -> None:
            native.sum_rows(x[rows], vectors, sums[rows])

        kernels.rows_in_parts(part, *x.shape)
        return sums
    halves = torch.cat(_halves(vectors)).t()
    k, step = len(vectors), max(1, _ROWS // max(1, x.shape[1]))
    out = torch.empty(len(x), k, dtype=torch.int64)
    for start in range(0, len(x), step):
        low, high = (part @ halves for part in _halves(x[start : start + step]))
        mixed = reduce_((low[:, k:] + high[:, :k]).long()).mul_(1 << 16)
        top = reduce_(high[:, k:].long()).mul_(5)  # 2^32 mod p
        torch.add(mixed.add_(top), low[:, :k].long(), out=out[start : start + step])
    return reduce_(out)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as low + 2^16 high, in float64: products of these are below 2^32, their sums exact."""
    return x.bitwise_and(0xFFFF).double(), x.bitwise_right_shift(16).double()

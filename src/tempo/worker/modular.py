"""Products mod p of residues with small integers, exactly."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tempo.wire.residues import HALF, reduce_

_EXACT: Final = 1 << 53
"""Integers up to here are float64 numbers, and sums of them exact in any order."""


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``a b mod p``, in float64 by as many columns of ``a`` at a time as keep sums exact.

    Args:
        a: Residues (T, K), int32.
        b: (K, N), int8 or int16.
        out: Residues (T, N), int32.
    """
    largest = max(1, int(b.max()), -int(b.min())) if b.numel() else 1
    step = _EXACT // (HALF * largest + HALF)  # with what was summed before
    total = torch.zeros(out.shape, dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], step):
        part = slice(start, start + step)
        reduce_(total.addmm_(a[:, part].double(), b[part].double()))
    out.copy_(total)

"""Rows as integers mod p, shared; and sums of answers as numbers again: one pass over memory each.

A row is rounded in steps of its own, chosen so that no sum with a column of the weight's integers leaves the residues:
for ``|x_q| · ω ≤ HALF``, with ω the largest norm of such a column, Cauchy–Schwarz bounds every sum by HALF. With
``x_q = x / step + e``, ``|e_i| ≤ 1/2``, it is enough that ``step ≥ |x| ω / (HALF − ω√d / 2)``. Steps stay here: nothing
that is sent depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Final

import torch
from torch import Tensor

from tempo.verify.field import row_sums
from tempo.wire.residues import HALF, expand, reduce_

_ROUNDING: Final = 1 + 2**-18
"""More than what computing a norm in float64 and a step in float32 rounds off."""


def share_rows(
    x: Tensor, scales: Tensor | None, omega: float, seeds: Sequence[bytes], out: Tensor, vectors: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Round rows to integers and write what is left of them after the shares that ``seeds`` stand for.

    Args:
        x: (T, d), finite.
        scales: (d), by which columns are multiplied first, or None.
        omega: The largest norm of a column of integers that rows meet; below `most_omega`.
        seeds: One for each share.
        out: int32 (T, d), for ``x_q − Σ shares mod p``.
        vectors: int32 (k, d), to sum rows with, or None.

    Returns:
        Steps (T, 1), float32; and ``x_q v mod p``, int64 (T, k), if there are vectors.
    """
    x = x.float() if scales is None else x.float() * scales
    reach = HALF - omega * sqrt(x.shape[1]) / 2
    steps = (
        torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64).mul_(omega / reach * _ROUNDING).float()
    )
    steps.masked_fill_(steps == 0, 1.0)
    torch.round(x / steps, out=(rounded := torch.empty_like(x)))
    integers = rounded.to(torch.int32)
    sums = None if vectors is None else row_sums(integers, vectors)
    left = integers.long()
    share = torch.empty(x.shape, dtype=torch.int32)
    for seed in seeds:
        left -= expand(seed, share)
    out.copy_(reduce_(left))
    return steps, sums


def combine_rows(
    parts: Sequence[Tensor],
    steps: Tensor,
    scales: Tensor | None,
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    vectors: Tensor | None,
) -> Tensor | None:
    """Add the products of shares, and give the sum its scale again.

    Args:
        parts: int32 (T, m) each, any values.
        steps: (T, 1), of `share_rows`.
        scales: (m), by which columns are multiplied, or None.
        biases: For each of ``outs``, what to add, or None.
        outs: Pieces of the columns to write, one after the other.
        vectors: int32 (k, m), to sum rows with, or None.

    Returns:
        ``Σ parts v mod p``, int64 (T, k), if there are vectors.
    """
    total = parts[0].long()
    for part in parts[1:]:
        total += part
    residues = reduce_(total)
    sums = None if vectors is None else row_sums(residues.to(torch.int32), vectors)
    numbers = residues.float().mul_(steps)
    if scales is not None:
        numbers.mul_(scales)
    for piece, bias, out in zip(numbers.split([out.shape[1] for out in outs], 1), biases, outs, strict=True):
        out.copy_(piece if bias is None else piece + bias)
    return sums


def most_omega(features: int) -> float:
    """Above this, rows of so many features would keep less than half of the range, and few bits."""
    return HALF / sqrt(max(1, features))

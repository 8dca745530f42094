"""Rows as integers mod p, shared; and sums of answers as numbers again: one pass over memory each.

A row is rounded in steps of its own, chosen so that no sum with a column of the weight's integers leaves the residues:
for ``|x_q| · ω ≤ HALF``, with ω the largest norm of such a column, Cauchy–Schwarz bounds every sum by HALF. With
``x_q = x / step + e``, ``|e_i| ≤ 1/2``, it is enough that ``step ≥ |x| ω / (HALF − ω√d / 2)``. Steps stay here: nothing
that is sent depends on them. A row that is not finite has a step that is not, and so a product that is not.

Natively where kernels can (`native/shares.h`; to make shares they need a processor with instructions for AES), and else
in PyTorch: the same numbers, but that a norm's sum in another order may make a step its neighbour in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from tempo import kernels
from tempo.schemes.low_rank import LowRank
from tempo.verify.field import row_sums
from tempo.wire.residues import HALF, expand, reduce_, replacements

_ROUNDING: Final = 1 + 2**-18
"""More than what computing a norm in float64 and a step in float32 rounds off."""

_LEAST_STEP: Final = 2.0**-126
"""Below, float32 rounds off more."""


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
    omega = max(omega, 1.0)  # zero where the weight is: rows are integers all the same
    ratio = omega / (HALF - omega * sqrt(x.shape[1]) / 2) * _ROUNDING
    native = kernels.native()
    if native and native.shares() and out.is_contiguous() and _in_reach([x]):
        return _share_natively(native, x.detach(), scales, ratio, seeds, out, vectors)
    x = x.float() if scales is None else x.float() * scales
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
    steps = norms.mul_(ratio).float().clamp_(min=_LEAST_STEP)
    torch.round(x / steps, out=(rounded := torch.empty_like(x)))
    integers = rounded.to(torch.int32)
    sums = None if vectors is None else row_sums(integers, vectors)
    left = integers.long()
    share = torch.empty(x.shape, dtype=torch.int32)
    for seed in seeds:
        left -= expand(seed, share)
    out.copy_(reduce_(left))
    return steps, sums


def _share_natively(
    native: ModuleType,
    x: Tensor,
    scales: Tensor | None,
    ratio: float,
    seeds: Sequence[bytes],
    out: Tensor,
    vectors: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    rows, columns = x.shape
    steps, sums = torch.empty(rows, 1), _sums(rows, vectors)
    refused: list[tuple[int, int, int]] = []

    def part(here: slice) -> None:
        of_part = None if sums is None else sums[here]
        start = here.start * columns
        refused.extend(
            native.share(x[here], scales, ratio, _LEAST_STEP, seeds, start, out[here], steps[here], vectors, of_part)
        )

    kernels.rows_in_parts(part, rows, columns)
    again, elements = [replacements(seed) for seed in seeds], out.view(-1)
    for seed, element, instead in sorted(refused):
        elements[element] = int(reduce_(elements[element].long() + instead - next(again[seed])))
    return steps, sums


def combine_rows(
    parts: Sequence[Tensor],
    steps: Tensor,
    scales: Tensor | None,
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    vectors: Tensor | None,
    added: Sequence[LowRank | None] = (),
) -> Tensor | None:
    """Add the products of shares, and give the sum its scale again.

    Args:
        parts: int32 (T, m) each, any values.
        steps: (T, 1), of `share_rows`.
        scales: (m), by which columns are multiplied, or None.
        biases: For each of ``outs``, what to add to its rows, or None; empty: nothing.
        outs: Pieces of the columns to write, one after the other.
        vectors: int32 (k, m), to sum rows with, or None.
        added: For each of ``outs``, what to add besides, or None; empty: nothing.

    Returns:
        ``Σ parts v mod p``, int64 (T, k), if there are vectors.
    """
    biases = biases or [None] * len(outs)
    native = kernels.native()
    if native and _in_reach(outs) and all(part.stride(1) == 1 or part.shape[1] <= 1 for part in parts):
        return _combine_natively(native, parts, steps, scales, biases, outs, vectors, added)
    total = parts[0].long()
    for part in parts[1:]:
        total += part
    residues = reduce_(total)
    sums = None if vectors is None else row_sums(residues.to(torch.int32), vectors)
    numbers = residues.float().mul_(steps)
    if scales is not None:
        numbers.mul_(scales)
    pieces = numbers.split([out.shape[1] for out in outs], 1)
    for piece, bias, one, out in zip(pieces, biases, added or [None] * len(outs), outs, strict=True):
        if bias is not None:
            piece += bias
        if one is not None:
            one.add_to(piece)
        out.copy_(piece)
    return sums


def _combine_natively(
    native: ModuleType,
    parts: Sequence[Tensor],
    steps: Tensor,
    scales: Tensor | None,
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    vectors: Tensor | None,
    added: Sequence[LowRank | None],
) -> Tensor | None:
    rows, columns = parts[0].shape
    sums = _sums(rows, vectors)
    numbers = [None if bias is None else bias.detach().float().contiguous() for bias in biases]

    def part(here: slice) -> None:
        of_part = None if sums is None else sums[here]
        products = [None if one is None else (one.low[here], one.up) for one in added]
        native.combine(
            [p[here] for p in parts],
            steps[here],
            scales,
            numbers,
            [out[here] for out in outs],
            vectors,
            of_part,
            products,
        )

    kernels.rows_in_parts(part, rows, columns)
    return sums


def _in_reach(matrices: Sequence[Tensor]) -> bool:
    """Whether kernels take matrices like these."""
    return all(t.dtype in kernels.DTYPES and (t.stride(1) == 1 or t.shape[1] <= 1) for t in matrices)


def _sums(rows: int, vectors: Tensor | None) -> Tensor | None:
    return None if vectors is None else torch.empty(rows, len(vectors), dtype=torch.int64)


def most_omega(features: int) -> float:
    """Above this, steps of rows of so many features might exceed a fifteenth of their root mean square."""
    return HALF / (16 * sqrt(max(1, features)))

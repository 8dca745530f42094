"""Sums of the rows and columns of a matrix with a few vectors, and how long these are, in one read of it.

Natively where the matrix is float32 or bfloat16, and else in PyTorch, in pieces that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from tempo import kernels
from tempo.schemes.reply import Tally
from tempo.verify.norms import lengths as lengths_of
from tempo.verify.norms import lost, out_of_range

_PIECE: Final = 1 << 19
"""Elements worked on at a time: what stays in a core's cache."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of rows, those with ``k`` vectors on the axis before the last, and how long the rows are (float64)."""

    sums: Tensor
    lengths: Tensor


def pieces(t: Tensor, work: torch.dtype, into: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    """Parts of ``t`` along axis 0 in the dtype ``work``, each with its start; of what was copied ``into``, if given."""
    step = max(1, _PIECE // max(1, prod(t.shape[1:])))
    for start in range(0, max(len(t), 1), step):
        piece = t[start : start + step]
        if into is not None:
            piece = into[start : start + step].copy_(piece)
        yield start, piece.to(work)


def of_rows(x: Tensor, v: Tensor, into: Tensor | None = None) -> Sums:
    """Sums (k, T) of the rows of ``x``.

    Args:
        x: (T, d).
        v: (k, d), in the dtype that sums are kept in.
        into: Where to copy ``x`` in the same pass, like it; what is summed is what lies there, whoever changes ``x``.
    """
    if native := _native(x, v.dtype):
        found = _empty(v, len(x))
        native.sums(x, into, v, found.sums, found.lengths)
        return found
    sums, norms = [v.new_empty(len(v), 0)], [v.new_empty(0, dtype=torch.float64)]
    for _, piece in pieces(x, v.dtype, into):
        sums.append(v @ piece.t())
        norms.append(lengths_of(piece, 1))
    return Sums(torch.cat(sums, 1), torch.cat(norms))


def of_both(x: Tensor, v: Tensor, q: Tensor) -> tuple[Sums, Sums]:
    """Sums (k, T) of the rows of ``x`` (T, d) with ``v`` (k, d), and (k', d) of its columns with ``q`` (k', T)."""
    work = v.dtype
    if native := _native(x, work):
        rows, columns = _empty(v, len(x)), _empty(q, x.shape[1])
        native.sums(x, None, v, rows.sums, rows.lengths, q, columns.sums, columns.lengths)
        columns.lengths.add_(lost(work, len(x)))  # of columns that are short where rows are long
        return rows, columns
    sums, norms = [v.new_empty(len(v), 0)], [v.new_empty(0, dtype=torch.float64)]
    of_columns, squares = v.new_zeros(len(q), x.shape[1]), v.new_zeros(x.shape[1], dtype=torch.float64)
    ones = v.new_ones(x.shape[1])
    for start, piece in pieces(x, work):
        sums.append(v @ piece.t())
        of_columns.addmm_(q[:, start : start + len(piece)], piece)
        square = piece.square()
        of_rows = square @ ones
        if out_of_range(of_rows.sqrt()):
            square = piece.double().square()
            of_rows = square @ ones.double()
        norms.append(of_rows.double().sqrt_() + lost(work, x.shape[1]))
        squares += (ones.new_ones(len(piece), dtype=square.dtype) @ square).double()
    return Sums(torch.cat(sums, 1), torch.cat(norms)), Sums(of_columns, squares.sqrt_() + lost(work, len(x)))


def tallied(tally: Tally | None) -> tuple[Sums, Sums | None] | None:
    """What ``tally`` summed of rows and columns while they were written, or None; to be asked for once."""
    if tally is None or tally.rows is None:
        return None
    work, (width, count) = tally.vectors.dtype, (tally.vectors.shape[1], tally.rows.lengths.numel())
    rows = Sums(tally.rows.sums, tally.rows.lengths.add_(lost(work, width)))  # of rows shorter than others
    if tally.columns is None:
        return rows, None
    sums, lengths = tally.columns
    return rows, Sums(sums, lengths.add_(lost(work, count)))


def _native(x: Tensor, work: torch.dtype) -> ModuleType | None:
    """The kernels, if they can read ``x``."""
    fits = (
        work == torch.float32 and x.dtype in kernels.DTYPES and x.numel() > 0 and (x.stride(1) == 1 or x.shape[1] == 1)
    )
    return kernels.native() if fits else None


def _empty(vectors: Tensor, count: int) -> Sums:
    return Sums(vectors.new_empty(len(vectors), count), vectors.new_empty(count, dtype=torch.float64))

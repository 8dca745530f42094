"""Applies an operator to the rows and one to the columns of a tensor, in one pass over memory where possible."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tempo.schemes.operators import Blocks, Gather, Operator, inverse_index

_CHUNK = 1 << 18
"""Elements handled at a time, so that the passes of one chunk stay in the second-level cache."""

_MIX_CHUNK = 1 << 17
"""The same where blocks mix: they pass over more copies of a chunk."""


def sandwich(x: Tensor, rows: Operator | None, columns: Operator | None, out: Tensor) -> None:
    """Write ``rows · x · columnsᵀ`` into ``out``, at every position of further axes; None is the identity.

    Where ``x`` is a grouped convolution's weight, axis 1 counts channels within a group, and ``columns`` spans all
    groups: row ``i`` then uses the columns of its own group.
    """
    if out.numel() == 0:
        return
    if rows is None and columns is None:
        out.copy_(x)
    elif any(operator is not None and operator.blocks for operator in (rows, columns)):
        _mix(x, rows, columns, out)
    else:
        row, column = (None if operator is None else operator.gathers[0] for operator in (rows, columns))
        (_gather_matrix if x.dim() == 2 else _gather_planes)(x, row, column, out)


def _work_dtype(x: Tensor) -> torch.dtype:
    # Scales are applied in at least float32 and rounded once, into the target's dtype.
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scale(gather: Gather, dtype: torch.dtype) -> Tensor:
    return torch.ones(len(gather.index), dtype=dtype) if gather.scale is None else gather.scale.to(dtype)


def _gather_matrix(x: Tensor, rows: Gather | None, columns: Gather | None, out: Tensor) -> None:
    height, width = out.shape
    work = _work_dtype(x)
    row_scale = None if rows is None else _scale(rows, work).unsqueeze(1)
    column_scale = None if columns is None else _scale(columns, work)
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, height, step):
        chunk = slice(start, start + step)
        values = x[chunk] if rows is None else x.index_select(0, rows.index[chunk])
        if columns is not None:
            values = values.index_select(1, columns.index)
        if row_scale is None:
            torch.mul(values, column_scale, out=out[chunk])  # type: ignore[arg-type]
        elif column_scale is None:
            torch.mul(values, row_scale[chunk], out=out[chunk])
        else:
            torch.mul(values, row_scale[chunk] * column_scale, out=out[chunk])


def _gather_planes(x: Tensor, rows: Gather | None, columns: Gather | None, out: Tensor) -> None:
    height, width = x.shape[:2]
    work = _work_dtype(x)
    row_index = torch.arange(out.shape[0]) if rows is None else rows.index.long()
    row_scale = torch.ones(len(row_index), dtype=work) if rows is None else _scale(rows, work)
    if columns is None:
        column_index = torch.arange(width).unsqueeze(0)
        column_scale = torch.ones(1, width, dtype=work)
    else:
        # One line per group; without groups there is one, broadcast over all rows.
        groups = max(1, len(columns.index) // width)
        column_index = columns.index.long().view(groups, -1) % width
        column_scale = _scale(columns, work).view(groups, -1)
        if groups > 1:
            column_index = column_index.repeat_interleave(len(row_index) // groups, 0)
            column_scale = column_scale.repeat_interleave(len(row_index) // groups, 0)
    planes = (row_index.unsqueeze(1) * width + column_index).view(-1)
    scale = (row_scale.unsqueeze(1) * column_scale).view(-1, 1)
    flat = x.contiguous().view(height * width, -1)
    flat_out = out.view(len(planes), -1)
    step = max(1, _CHUNK // max(1, flat.shape[1]))
    for start in range(0, len(planes), step):
        chunk = slice(start, start + step)
        torch.mul(flat.index_select(0, planes[chunk]), scale[chunk], out=flat_out[chunk])


def _mix(x: Tensor, rows: Operator | None, columns: Operator | None, out: Tensor) -> None:
    """`sandwich` where an operator has blocks."""
    work = _work_dtype(x)
    rows, columns = (None if operator is None else operator.to(work) for operator in (rows, columns))
    if x.dim() > 3:
        x, out = x.flatten(2), out.view(*out.shape[:2], -1)
    if columns is not None and columns.size != x.shape[1]:
        _mix_grouped(x.to(work), rows, columns, out)
        return
    for where, values in _mixed_rows(x, rows, work):
        if columns is not None:
            values = columns.apply(values, 1)
        out.index_copy_(0, where, values.to(out.dtype))


def _mixed_rows(x: Tensor, rows: Operator | None, work: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Where rows of the output lie, and what they are, a chunk at a time."""
    step = max(1, _MIX_CHUNK // max(1, x[0].numel()))
    if rows is None or not rows.blocks:
        x = x.to(work) if rows is None else rows.apply(x.to(work), 0)
        places = torch.arange(len(x))
        yield from zip(places.split(step), x.split(step), strict=True)
        return
    *before, last = rows.blocks
    for gather, blocks in zip(rows.gathers, before, strict=False):
        x = blocks.apply(gather.apply(x.to(work), 0), 0)
    read, write = rows.gathers[-2].index, inverse_index(rows.gathers[-1].index).long()
    start = 0
    for batch in last.batches:
        for blocks in batch.split(max(1, step // batch.shape[1])):
            chunk = slice(start, start + blocks.shape[0] * blocks.shape[1])
            start = chunk.stop
            yield write[chunk], Blocks((blocks,)).apply(x.index_select(0, read[chunk]).to(work), 0)


def _mix_grouped(x: Tensor, rows: Operator | None, columns: Operator, out: Tensor) -> None:
    """`_mix` for a grouped convolution's weight: the columns of a row are those of its own group."""
    width = x.shape[1]
    groups = columns.size // width
    # Channels of one group come from one group, so applied to identities stacked, the operator shows its square parts.
    squares = columns.apply(torch.eye(width, dtype=x.dtype).repeat(groups, 1), 0).view(groups, width, width)
    mixed = x if rows is None else rows.apply(x, 0)
    out.copy_(torch.einsum("gcd,gods->gocs", squares, mixed.unflatten(0, (groups, -1))).flatten(0, 1))

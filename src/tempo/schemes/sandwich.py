"""Applies an operator to the rows and one to the columns of a tensor, in one pass over memory where possible."""

from __future__ import annotations

import torch
from torch import Tensor

from tempo.schemes.block_sandwich import block_sandwich
from tempo.schemes.operators import Gather, Operator, work_dtype

_CHUNK = 1 << 18
"""Elements handled at a time, so that the passes of one chunk stay in the second-level cache."""


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
        block_sandwich(x, rows, columns, [out])
    else:
        row, column = (None if operator is None else operator.gathers[0] for operator in (rows, columns))
        (_gather_matrix if x.dim() == 2 else _gather_planes)(x, row, column, out)


def _scale(gather: Gather, dtype: torch.dtype) -> Tensor:
    return torch.ones(len(gather.index), dtype=dtype) if gather.scale is None else gather.scale.to(dtype)


def _gather_matrix(x: Tensor, rows: Gather | None, columns: Gather | None, out: Tensor) -> None:
    height, width = out.shape
    work = work_dtype(x)
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
    work = work_dtype(x)
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

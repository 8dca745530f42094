"""Applies an operator to the rows and one to the columns of a tensor: in one pass over memory by the native kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from tempo import kernels
from tempo.schemes.block_sandwich import block_sandwich
from tempo.schemes.low_rank import LowRank
from tempo.schemes.operators import Gather, Operator, Steps, work_dtype
from tempo.schemes.reply import MOST_WATCHED, MOST_WEIGHTS, Tally, Watch
from tempo.wire.layout import is_last

_CHUNK = 1 << 18
"""Elements handled at a time, so that the passes of one chunk stay in the second-level cache."""


def sandwich(
    x: Tensor,
    rows: Operator | None,
    columns: Operator | None,
    outs: Sequence[Tensor],
    axis: int = 1,
    biases: Sequence[Tensor | None] | None = None,
    watch: Watch | None = None,
    plus: LowRank | None = None,
    tally: Tally | None = None,
) -> None:
    """Write ``rows · x · columnsᵀ + plus``, at every position of further axes; None is the identity.

    Where ``x`` is a grouped convolution's weight, axis 1 counts channels within a group, and ``columns`` spans all
    groups: row ``i`` then uses the columns of its own group.

    Args:
        x: Rows first, columns second.
        rows: Applies to axis 0.
        columns: Applies to axis 1.
        outs: Where to write: consecutive pieces of the result along ``axis``.
        axis: 0 or 1.
        biases: What to add to every row of each piece, one number for each of its columns; None: nothing.
        watch: What to sum of the rows of ``x``, which then is read once, if it is ``seen``. Rows of maps are
            pixels, one image after the other.
        plus: What to add to the result; only of matrices, with pieces along axis 1.
        tally: What to sum of the result, likewise, where the kernels can: of one piece, nothing added.
    """
    if x.numel() == 0:
        return
    native = kernels.native()
    if native is not None and x.dtype in kernels.DTYPES:
        kernel = partial(_in_kernel, native, rows, columns, axis, biases, watch, plus, tally)
        if kernel(x, outs) or (x.dim() > 2 and _turned(kernel, x, outs, columns)):
            return
    row_steps, column_steps = (None if operator is None else operator.steps for operator in (rows, columns))
    if plus is None and (axis == 1 or len(outs) == 1):
        _in_torch(x, row_steps, column_steps, outs)
    else:
        whole = torch.empty(x.shape, dtype=work_dtype(x))
        _in_torch(x, row_steps, column_steps, [whole])
        if plus is not None:
            plus.add_to(whole)
        for out, piece in zip(outs, whole.split([out.shape[axis] for out in outs], axis), strict=True):
            out.copy_(piece)
    if biases is not None:
        add_biases(outs, biases)


def add_biases(outs: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    """Add to each of ``outs`` its bias, one number for each column, in place."""
    for out, bias in zip(outs, biases, strict=True):
        if bias is not None:
            out += bias.to(out.dtype).view(-1, *[1] * (out.dim() - 2))


def _in_kernel(
    native: ModuleType,
    rows: Operator | None,
    columns: Operator | None,
    axis: int,
    biases: Sequence[Tensor | None] | None,
    watch: Watch | None,
    plus: LowRank | None,
    tally: Tally | None,
    x: Tensor,
    outs: Sequence[Tensor],
) -> bool:
    """Have the native kernel do it, where all lies in memory as matrices do."""
    room = None if tally is None or plus is not None else _room(tally, x.numel() // x.shape[1])
    found = native.sandwich(
        x,
        None if rows is None else (rows.mask.native, rows.form),
        None if columns is None else (columns.mask.native, columns.form),
        outs,
        axis,
        [None if bias is None else bias.detach().to(torch.float32).contiguous() for bias in biases or ()],
        None if watch is None else (watch.vectors, watch.sums, watch.lengths),
        None if plus is None else (plus.low, plus.up),
        room,
    )
    if found is None:
        return False
    seen, made = found
    if watch is not None:
        watch.seen = seen
    if tally is not None and room is not None and made:
        tally.rows = Watch(*room[:3], seen=True)
        tally.columns = None if room[3] is None else room[3][1:]
    return True


def _turned(
    kernel: Callable[[Tensor, Sequence[Tensor]], bool], x: Tensor, outs: Sequence[Tensor], columns: Operator | None
) -> bool:
    """Have ``kernel`` do it on ``x`` as ``outs`` lie; or, with blocks of columns, where channels lie side by side."""
    if is_last(outs[0]):
        return kernel(_channels_last(x), outs)
    if not x.is_contiguous() and kernel(x.contiguous(), outs):
        return True
    if columns is None or not columns.mask.blocks:
        return False
    turned = [torch.empty((len(out), *out.shape[2:], out.shape[1]), dtype=out.dtype).movedim(-1, 1) for out in outs]
    if not kernel(_channels_last(x), turned):
        return False
    for out, values in zip(outs, turned, strict=True):
        out.copy_(values)
    return True


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _of_planes(gather: Gather, positions: int) -> Gather:
    """``gather`` where every element is a plane of so many."""
    index = gather.index.unsqueeze(1) * positions + torch.arange(positions, dtype=gather.index.dtype)
    scale = None if gather.scale is None else gather.scale.repeat_interleave(positions)
    return Gather(index.view(-1), scale)


def _room(tally: Tally, rows: int) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None] | None:
    """Where the kernel puts sums; None if it cannot make them."""
    vectors, weights = tally.vectors, tally.weights
    if len(vectors) > MOST_WATCHED or (weights is not None and not 0 < len(weights) <= MOST_WEIGHTS):
        return None
    of_rows = Watch.of(vectors, rows)
    of_columns = None
    if weights is not None:
        width = vectors.shape[1]
        lengths = weights.new_empty(width, dtype=torch.float64)
        of_columns = weights, weights.new_empty(len(weights), width), lengths
    return of_rows.vectors, of_rows.sums, of_rows.lengths, of_columns


def _in_torch(x: Tensor, rows: Steps | None, columns: Steps | None, outs: Sequence[Tensor]) -> None:
    """The same without kernels; pieces along axis 1."""
    if is_last(outs[0]) and not (rows is None and columns is None):
        (out,) = outs
        _pixels_in_torch(x, rows, columns, out)
        return
    if any(operator is not None and operator.blocks for operator in (rows, columns)):
        block_sandwich(x, rows, columns, outs)
        return
    row, column = (None if operator is None else operator.gathers[0] for operator in (rows, columns))
    gather = _gather_matrix if x.dim() == 2 else _gather_planes
    start = 0
    for out in outs:
        which = slice(start, start + out.shape[1])
        start = which.stop
        whole = len(outs) == 1
        piece = x if whole or column is not None else x[:, which]
        if row is None and column is None:
            out.copy_(piece)
        else:
            gather(piece, row, column if whole or column is None else column.part(which), out)


def _pixels_in_torch(x: Tensor, rows: Steps | None, columns: Steps | None, out: Tensor) -> None:
    """Where channels lie last: with the rows of all pixels at once, or columns of pixels and then rows of images."""
    x, out = x.movedim(1, -1), out.movedim(1, -1)
    width = x.shape[-1]
    if rows is not None and not rows.blocks:
        pixels, gather = prod(x.shape[1:-1]), rows.gathers[0]
        _in_torch(x.reshape(-1, width), Steps((_of_planes(gather, pixels),)), columns, [out.view(-1, width)])
        return
    between = x
    if columns is not None:
        between = out if rows is None else torch.empty(x.shape, dtype=work_dtype(x))
        _in_torch(x.reshape(-1, width), None, columns, [between.view(-1, width)])
    if rows is not None:
        _in_torch(between.reshape(len(x), -1), rows, None, [out.view(len(x), -1)])


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

"""Applies operators with blocks to rows and columns, a chunk of row blocks at a time.

Where the time goes, per element of float32 at blocks of 32 (Zen 3, one core): a product with blocks 1.0 ns, moving
whole rows 0.2 to 0.3, permuting within rows 0.5, transposing 0.7. Hence the order of things: columns are permuted
within rows once; the product with column blocks then also transposes, so that further columns are moved whole; and the
product with row blocks transposes back. Results of products are contiguous, or `torch.bmm` would go block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from tempo.schemes.operators import Blocks, Steps, work_dtype

_CHUNK = 1 << 19
"""Elements handled at a time: fewer make products small, more leave the third-level cache."""


def block_sandwich(x: Tensor, rows: Steps | None, columns: Steps | None, outs: Sequence[Tensor]) -> None:
    """`tempo.schemes.sandwich.sandwich` where an operator has blocks; ``outs`` are consecutive pieces along axis 1."""
    if x.numel() == 0:
        return
    work = work_dtype(x)
    rows, columns = (None if operator is None else operator.to(work) for operator in (rows, columns))
    if x.dim() > 3:
        x, outs = x.flatten(2), [out.view(*out.shape[:2], -1) for out in outs]
    if columns is not None and columns.size != x.shape[1]:
        _grouped(x.to(work), rows, columns, outs)
    elif rows is None or not rows.blocks:
        _by_rows(x, rows, columns, outs)
    else:
        _by_row_blocks(x, rows, columns, outs)


class _Scratch:
    """Two buffers of a chunk's size, used in turn: fresh memory would cost a page fault for every 4 KiB."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffers = [torch.empty(size, dtype=dtype) for _ in range(2)]

    def next(self, *shape: int) -> Tensor:
        """The buffer that does not hold the last result."""
        self._buffers.reverse()
        return self._buffers[0][: prod(shape)].view(shape)

    def select(self, source: Tensor, axis: int, index: Tensor) -> Tensor:
        """The elements ``index`` of ``source`` along ``axis``."""
        shape = (*source.shape[:axis], len(index), *source.shape[axis + 1 :])
        if source.dtype == self.dtype:
            return torch.index_select(source, axis, index, out=self.next(*shape))
        return self.next(*shape).copy_(source.index_select(axis, index))


def _by_row_blocks(x: Tensor, rows: Steps, columns: Steps | None, outs: Sequence[Tensor]) -> None:
    work, size = work_dtype(x), x[0].numel()
    write = rows.gathers[-1].transpose().index.numpy()
    for number, (gather, blocks) in enumerate(zip(rows.gathers, rows.blocks, strict=False)):
        chunks = list(_chunks(blocks, max(1, _CHUNK // size)))
        scratch = _Scratch(size * max(chunk.stop - chunk.start for chunk, _ in chunks), work)
        last = number == len(rows.blocks) - 1
        between = None if last else torch.empty(x.shape, dtype=work)
        for chunk, part in chunks:
            values = scratch.select(x, 0, gather.index[chunk])
            if columns is not None:
                values = _apply_columns(values, columns, scratch)
            mixed = scratch.next(*values.shape) if between is None else between[chunk]
            _multiply(part, values.flatten(1), mixed.flatten(1))
            if last:
                _scatter(mixed, write[chunk], outs)
        if between is not None:
            x, columns = between, None


def _by_rows(x: Tensor, rows: Steps | None, columns: Steps | None, outs: Sequence[Tensor]) -> None:
    """`block_sandwich` where ``rows`` only moves and scales."""
    gather = None if rows is None else rows.gathers[0]
    step = max(1, _CHUNK // x[0].numel())
    scratch = _Scratch(x[:step].numel(), work_dtype(x))
    for start in range(0, len(x), step):
        chunk = slice(start, start + step)
        if gather is not None:
            values = scratch.select(x, 0, gather.index[chunk])
        elif x.dtype == scratch.dtype:
            values = x[chunk].contiguous()
        else:
            values = scratch.next(*x[chunk].shape).copy_(x[chunk])
        if columns is not None:
            values = _apply_columns(values, columns, scratch)
        if gather is not None and gather.scale is not None:
            values.mul_(gather.scale[chunk].view(-1, *[1] * (x.dim() - 1)))
        for out, piece in zip(outs, _pieces(values, outs), strict=True):
            out[chunk].copy_(piece)


def _grouped(x: Tensor, rows: Steps | None, columns: Steps, outs: Sequence[Tensor]) -> None:
    """`block_sandwich` for a grouped convolution's weight: the columns of a row are those of its own group."""
    width = x.shape[1]
    groups = columns.size // width
    # Channels of one group come from one group, so applied to identities stacked, the operator shows its square parts.
    squares = torch.empty(groups, width, width, dtype=x.dtype)
    block_sandwich(torch.eye(width, dtype=x.dtype).repeat(groups, 1), columns, None, [squares.view(-1, width)])
    mixed = x
    if rows is not None:
        mixed = torch.empty_like(x, memory_format=torch.contiguous_format)
        block_sandwich(x, rows, None, [mixed])
    mixed = torch.einsum("gcd,gods->gocs", squares, mixed.unflatten(0, (groups, -1))).flatten(0, 1)
    for out, piece in zip(outs, _pieces(mixed, outs), strict=True):
        out.copy_(piece)


def _chunks(blocks: Blocks, rows: int) -> Iterator[tuple[slice, Blocks]]:
    """Consecutive blocks of one size, of about ``rows`` rows together, and where those lie."""
    start = 0
    for batch in blocks.batches:
        for part in batch.split(max(1, rows // batch.shape[1])):
            chunk = slice(start, start + part.shape[0] * part.shape[1])
            start = chunk.stop
            yield chunk, Blocks((part,))


def _apply_columns(values: Tensor, columns: Steps, scratch: _Scratch) -> Tensor:
    """``columns`` along axis 1 of ``values`` (rows, width) or (rows, width, positions), which are contiguous.

    The result is a view of ``scratch``; with two axes it is transposed in memory.
    """
    first, *between = columns.gathers
    if not columns.blocks:
        values = scratch.select(values, 1, first.index)
        return values if first.scale is None else values.mul_(first.scale.view(-1, *[1] * (values.dim() - 2)))
    rows, width = values.shape[:2]
    if values.dim() == 2:
        x = scratch.select(values, 1, first.index).t()
    else:
        planes = first.index.unsqueeze(1) + width * torch.arange(rows)
        x = scratch.select(values.view(rows * width, -1), 0, planes.view(-1)).view(width, -1)
    for blocks, gather in zip(columns.blocks[:-1], between, strict=False):
        x = _multiply(blocks, x, scratch.next(*x.shape))
        x = scratch.select(x, 0, gather.index)
    x = _multiply(columns.blocks[-1], x, scratch.next(*x.shape))
    last = columns.gathers[-1].index
    if values.dim() == 2:
        return scratch.select(x, 0, last).t()
    planes = rows * last + torch.arange(rows).unsqueeze(1)
    return scratch.select(x.view(rows * width, -1), 0, planes.view(-1)).view(values.shape)


def _multiply(blocks: Blocks, x: Tensor, out: Tensor) -> Tensor:
    """``blocks · x`` into ``out``, which is contiguous."""
    start = 0
    for batch in blocks.batches:
        shape = batch.shape[:2]
        part = slice(start, start + prod(shape))
        start = part.stop
        torch.bmm(batch, x[part].unflatten(0, shape), out=out[part].unflatten(0, shape))
    return out


def _pieces(values: Tensor, outs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = values.split([out.shape[1] for out in outs], 1)
    return pieces


def _scatter(values: Tensor, where: np.ndarray, outs: Sequence[Tensor]) -> None:
    """Write rows of ``values`` to the rows ``where`` of ``outs``."""
    for out, piece in zip(outs, _pieces(values, outs), strict=True):
        # NumPy copies whole rows; `index_copy_` goes element by element and takes twice as long.
        _array(out)[where] = _array(piece.to(out.dtype))


def _array(x: Tensor) -> np.ndarray:
    array: np.ndarray = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return array

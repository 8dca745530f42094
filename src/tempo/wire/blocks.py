"""Eight bits per element: MXINT8 of the OCP Microscaling Formats specification, version 1.0.

Each row of a tensor (what lies under one index of axis 0) is cut, as it lies in memory, into blocks of 32 elements, the
last one shorter if need be; blocks do not cross rows, since masks scale rows by factors that differ widely. A block has
a scale, a power of two kept as its exponent in one byte, and an integer from -127 to 127 for each element, which is
rounded to nearest; 8.25 bits each::

    exponents, one byte per block · integers, one byte per element         value = integer · 2^(exponent - 133)

The scale is the least for which the largest element of the block is below 128. So the error is at most 1/128 of that
element, and typically 1/400. Exponent 255 is a block that was not finite. All values fit into bfloat16 without further
rounding, and are rounded to themselves: what was unpacked is packed into the same bytes again.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 32
_BIAS: Final = 133
_PART: Final = 1 << 16  # elements at once: they stay in the processor's cache
_LEAST: Final = 7  # its scale is the least normal number of float32
_NOT_FINITE: Final = 255
_SCALES: Final = torch.tensor(
    [2.0 ** (exponent - _BIAS) for exponent in range(_NOT_FINITE)] + [float("nan")], dtype=torch.float32
)


def packed_size(shape: tuple[int, ...]) -> int:
    """Bytes of a packed tensor."""
    rows, width = _matrix(shape)
    return rows * (-(-width // BLOCK) + width)


def pack(x: Tensor, out: Tensor) -> None:
    """Pack ``x`` (float32, contiguous) into ``out`` (uint8, of `packed_size` elements)."""
    for values, exponents, integers in _blocks(x, out):
        largest = torch.linalg.vector_norm(values, float("inf"), dim=2)
        exponent = torch.frexp(largest).exponent.add_(126).clamp_(_LEAST, _NOT_FINITE - 1)
        exponent.masked_fill_(largest == 0, _LEAST)  # as of what is rounded to zero
        exponent.masked_fill_(~torch.isfinite(largest), _NOT_FINITE)
        exponents.copy_(exponent)
        integers.copy_((values / _SCALES[exponent].unsqueeze(2)).round_().clamp_(-127, 127).nan_to_num_(0.0))


def unpack(packed: Tensor, out: Tensor) -> None:
    """Unpack into ``out`` (float32 or bfloat16, contiguous)."""
    for values, exponents, integers in _blocks(out, packed):
        values.copy_(integers * _SCALES[exponents.int()].unsqueeze(2))


def snap_(x: Tensor) -> Tensor:
    """Round ``x`` (float32, contiguous) in place to what `unpack` will make of it."""
    packed = torch.empty(packed_size(tuple(x.shape)), dtype=torch.uint8)
    pack(x, packed)
    unpack(packed, x)
    return x


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    rows = shape[0] if len(shape) > 1 else 1
    return rows, prod(shape) // max(rows, 1)


def _blocks(x: Tensor, packed: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Elements (rows, blocks, block), exponents (rows, blocks), integers; some rows at a time, short blocks apart."""
    rows, width = _matrix(tuple(x.shape))
    if not x.numel():
        return
    count = -(-width // BLOCK)
    elements = x.view(rows, width)
    exponents = packed[: rows * count].view(rows, count)
    integers = packed[rows * count :].view(torch.int8).view(rows, width)
    whole = width // BLOCK
    step = max(1, _PART // width)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        for columns, blocks in (slice(whole * BLOCK), slice(whole)), (slice(whole * BLOCK, None), slice(whole, None)):
            found = exponents[part, blocks]
            if found.numel():
                shape = (found.shape[1], -1)
                yield elements[part, columns].unflatten(1, shape), found, integers[part, columns].unflatten(1, shape)

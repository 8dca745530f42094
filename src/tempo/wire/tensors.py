"""Tensors as bytes: names and sizes of dtypes, references, raw views."""

from __future__ import annotations

from math import prod
from typing import Final, get_args

import torch
from torch import Tensor

from tempo.wire.blocks import packed_size
from tempo.wire.messages import DType, TensorRef

PACKED: Final[DType] = "mxint8"
DTYPES: Final[dict[DType, torch.dtype]] = {name: getattr(torch, name) for name in get_args(DType) if name != PACKED}
NAMES: Final[dict[torch.dtype, DType]] = {dtype: name for name, dtype in DTYPES.items()}
_ITEMSIZE: Final = {name: dtype.itemsize for name, dtype in DTYPES.items()}


def size_of(ref: TensorRef) -> int:
    """Bytes of the tensor that ``ref`` describes."""
    return packed_size(ref.shape) if ref.dtype == PACKED else prod(ref.shape) * _ITEMSIZE[ref.dtype]


def layout_of(ref: TensorRef) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the tensor that holds the bytes of ``ref``: its own, or packed bytes."""
    return ((packed_size(ref.shape),), torch.uint8) if ref.dtype == PACKED else (ref.shape, DTYPES[ref.dtype])


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    return tensor.detach().view(-1).view(torch.uint8).numpy().data

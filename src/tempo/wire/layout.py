"""Where the axes of feature maps lie in memory, and so on the wire.

Axis 1 is channels, by its meaning. Under `Conv.channels_last` maps (``x``, ``y``, ``g``, ``dx``) lie and travel as
N×…×C, and both sides compute on views of that; weights travel as they are written down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tempo.wire.messages import Product, Shape

_MAPS = ("x", "y", "g", "dx")


def sent(product: Product, name: str, t: Tensor) -> Tensor:
    """The tensor ``name`` of a message, with axes in the order in which they travel: a view."""
    return t.movedim(1, -1) if product.channels_last and name in _MAPS else t


def meant(product: Product, name: str, t: Tensor) -> Tensor:
    """A tensor that travelled, with channels on axis 1: a view."""
    return t.movedim(-1, 1) if product.channels_last and name in _MAPS else t


def sent_shape(product: Product, name: str, shape: Shape) -> Shape:
    """The shape in which a tensor travels."""
    return (shape[0], *shape[2:], shape[1]) if product.channels_last and name in _MAPS else shape


def meant_shape(product: Product, name: str, shape: Shape) -> Shape:
    """The shape of a tensor that travels in ``shape``, with channels on axis 1."""
    return (shape[0], *shape[-1:], *shape[1:-1]) if product.channels_last and name in _MAPS else shape


def is_last(t: Tensor) -> bool:
    """Whether channels are contiguous in ``t`` and pixels are not."""
    return t.dim() > 2 and t.stride(1) == 1 and not t.is_contiguous() and t.movedim(1, -1).is_contiguous()


def empty_like(t: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Room for ``shape``, with axes in the order of ``t``'s."""
    if not is_last(t):
        return torch.empty(shape, dtype=dtype)
    return torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype).movedim(-1, 1)


def maps(product: Product, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Room for ``x``, ``y``, ``g`` or ``dx``, with axes in the order in which they travel."""
    return meant(product, "x", torch.empty(sent_shape(product, "x", shape), dtype=dtype))

"""The three products of a layer, for the few rows and features that the trusted side corrects by itself.

All compute in at least float32. Shapes are those of `tempo.wire.messages`: rows first, features second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tempo.schemes.operators import work_dtype
from tempo.wire.messages import Conv, Product


def output(product: Product, x: Tensor, w: Tensor) -> Tensor:
    """``Y``."""
    x, w = (t.to(work_dtype(t)) for t in (x, w))
    if not isinstance(product, Conv):
        return x @ w.t()
    return torch.convolution(
        x, w, None, product.stride, product.padding, product.dilation, False, [0] * len(product.stride), product.groups
    )


def input_gradient(product: Product, g: Tensor, w: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``dX``, of ``shape``."""
    g, w = (t.to(work_dtype(t)) for t in (g, w))
    if not isinstance(product, Conv):
        return g @ w
    return _convolution_backward(product, g, w.new_empty(1).expand(shape), w, 0)


def weight_gradient(product: Product, x: Tensor, g: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``dW``, of ``shape``."""
    x, g = (t.to(work_dtype(t)) for t in (x, g))
    if not isinstance(product, Conv):
        return g.t() @ x
    return _convolution_backward(product, g, x, x.new_empty(1).expand(shape), 1)


def _convolution_backward(product: Conv, g: Tensor, x: Tensor, w: Tensor, which: int) -> Tensor:
    # Of the operand whose gradient is asked for, only the shape is looked at.
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        g,
        x,
        w,
        None,
        product.stride,
        product.padding,
        product.dilation,
        False,
        [0] * len(product.stride),
        product.groups,
        [which == 0, which == 1, False],
    )
    return gradients[which]

"""The three products of a layer, for the few rows and features that the trusted side corrects by itself.

All compute in at least float32. Shapes are those of `tempo.wire.messages`: rows first, features second.
"""

from __future__ import annotations

from math import prod
from typing import Final

import torch
from torch import Tensor

from tempo.engine.geometry import meetings
from tempo.schemes.operators import work_dtype
from tempo.wire.messages import Conv, Product

_CHUNK: Final = 1 << 18
"""Elements handled at a time: what stays in a core's cache."""


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


def subtract_input_gradient(product: Product, g: Tensor, w: Tensor, dx: Tensor) -> None:
    """``dX -= G W``, in place: of convolutions as one matrix product over what each pixel meets of few channels.

    ``dX`` is in the dtype that is computed in.
    """
    g, w = (t.to(work_dtype(t)) for t in (g, w))
    if not isinstance(product, Conv):
        dx -= g @ w
        return
    geometry = list(meetings(product, tuple(w.shape[2:]), tuple(dx.shape[2:]), list(g.shape[2:])))
    pixels = max(1, prod(dx.shape[2:]))
    groups = (t.chunk(product.groups, axis) for t, axis in ((dx, 1), (g, 1), (w, 0)))
    for of_inputs, of_outputs, weight in zip(*groups, strict=True):
        matrix = weight.flatten(2).permute(2, 0, 1).reshape(-1, weight.shape[1])
        step = max(1, _CHUNK // (pixels * len(matrix)))
        room = g.new_zeros(step, *dx.shape[2:], len(geometry), len(weight))  # where no tap meets, it stays zero
        images = zip(of_inputs.movedim(1, -1).split(step), of_outputs.movedim(1, -1).split(step), strict=True)
        for target, source in images:
            met, source = room[: len(target)], source.contiguous()
            for number, (_, at_inputs, at_outputs) in enumerate(geometry):
                met.select(-2, number)[:, *at_inputs] = source[:, *at_outputs]
            rows = target.flatten(0, -2)  # a view, where channels lie last and are all of them
            rows.addmm_(met.view(-1, len(matrix)), matrix, alpha=-1)
            if rows.data_ptr() != target.data_ptr():
                target.copy_(rows.view(target.shape))


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

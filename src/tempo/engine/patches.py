"""A convolution as a fully connected layer over patches: every tap of the kernel becomes a feature like any other."""

from __future__ import annotations

from math import prod
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempo.engine.geometry import output_shape
from tempo.verify.taps import meetings
from tempo.wire.messages import Conv

_CHUNK: Final = 1 << 19
"""Elements of patches turned at a time: what stays in a core's cache."""


def patches(x: Tensor, kind: Conv, kernel: tuple[int, ...]) -> Tensor:
    """The patches of ``x`` that an ungrouped convolution multiplies by its weight, flattened.

    Args:
        x: N×C×spatial.
        kind: The convolution; zeros pad.
        kernel: Its sizes.

    Returns:
        N × output positions × C·taps, features in the order of ``weight.flatten(1)``; differentiable once.
    """
    rows: Tensor = _Patches.apply(x, kind, kernel)
    return rows


class _Patches(torch.autograd.Function):
    """Whole pixels are moved tap by tap, some images at a time, and turned in the cache: taps come after channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Conv, kernel: tuple[int, ...]) -> Tensor:
        _, channels, *outputs = output_shape(kind, tuple(x.shape), (x.shape[1], x.shape[1], *kernel))
        ctx.geometry = geometry = list(meetings(kind, kernel, tuple(x.shape[2:]), outputs))
        ctx.shape = (len(x), *x.shape[2:], channels)
        rows = x.new_empty(len(x), *outputs, channels, prod(kernel))
        step = _images(rows)
        room = x.new_zeros(step, *outputs, prod(kernel), channels)  # padding stays zero
        for images, out in zip(x.movedim(1, -1).split(step), rows.split(step), strict=True):
            turned = room[: len(images)]
            for number, (_, at_inputs, at_outputs) in enumerate(geometry):
                turned.select(-2, number)[:, *at_outputs] = images[:, *at_inputs]
            out.copy_(turned.transpose(-1, -2))
        return rows.flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        dx = g.new_zeros(ctx.shape)
        rows = g.unflatten(-1, (ctx.shape[-1], len(ctx.geometry)))
        step = _images(rows)
        for images, part in zip(dx.split(step), rows.split(step), strict=True):
            turned = part.transpose(-1, -2).contiguous()
            for number, (_, at_inputs, at_outputs) in enumerate(ctx.geometry):
                images[:, *at_inputs] += turned.select(-2, number)[:, *at_outputs]
        return dx.movedim(-1, 1), None, None


def _images(rows: Tensor) -> int:
    """How many to handle at a time."""
    return max(1, _CHUNK // max(1, prod(rows.shape[1:])))

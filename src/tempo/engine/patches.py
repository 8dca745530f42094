"""A convolution as a fully connected layer over patches: every tap of the kernel becomes a feature like any other."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempo import kernels
from tempo.engine.geometry import meetings, output_shape
from tempo.wire.messages import Conv


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
    """Whole pixels are moved tap by tap, and interleaved: taps come after channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Conv, kernel: tuple[int, ...]) -> Tensor:
        _, channels, *outputs = output_shape(kind, tuple(x.shape), (x.shape[1], x.shape[1], *kernel))
        ctx.shape = (len(x), *x.shape[2:], channels)
        ctx.met = met = _met(kind, kernel, tuple(x.shape[2:]), tuple(outputs))
        maps = x.detach().movedim(1, -1).reshape(len(x), prod(x.shape[2:]), channels)
        native = kernels.native()
        if native is None or x.dtype != torch.float32:
            padded = torch.cat([maps, maps.new_zeros(len(x), 1, channels)], 1)  # which -1 is
            rows = padded[:, met.long()].transpose(-1, -2)
        else:
            maps, rows = maps.contiguous(), x.new_empty(len(x), *met.shape[:1], channels * met.shape[1])
            kernels.rows_in_parts(
                lambda part: native.make_patches(maps[part], met, rows[part]), len(x), rows[:1].numel()
            )
        return rows.reshape(len(x), *outputs, channels * met.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        images, *inputs, channels = ctx.shape
        met, size = ctx.met, prod(inputs)
        rows = g.reshape(images, len(met), g.shape[-1])
        native = kernels.native()
        if native is None or g.dtype != torch.float32:
            taps = rows.unflatten(-1, (channels, met.shape[1])).transpose(-1, -2).flatten(1, 2)
            maps = g.new_zeros(images, size + 1, channels).index_add_(1, met.long().view(-1) % (size + 1), taps)
            maps = maps[:, :size]
        else:
            rows, maps = rows.contiguous(), g.new_zeros(images, size, channels)
            kernels.rows_in_parts(
                lambda part: native.add_patches(rows[part], met, maps[part]), images, rows[:1].numel()
            )
        return maps.reshape(ctx.shape).movedim(-1, 1), None, None


@lru_cache(256)
def _met(kind: Conv, kernel: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Tensor:
    """Output pixels × taps (int32): the input pixel that is met, or -1 in the padding."""
    pixels = torch.arange(prod(inputs), dtype=torch.int32).view(inputs)
    met = torch.full((*outputs, prod(kernel)), -1, dtype=torch.int32)
    for number, (_, at_inputs, at_outputs) in enumerate(meetings(kind, kernel, inputs, outputs)):
        met.select(-1, number)[at_outputs] = pixels[at_inputs]
    return met.view(-1, prod(kernel))

"""Adds up what the taps of a kernel gave, where a convolution would: the geometry without the products."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

from tempo.wire.messages import Conv

_Slices = tuple[slice, ...]


def push(product: Conv, t: Tensor) -> Tensor:
    """From input pixels to output pixels.

    Args:
        product: The convolution.
        t: What each tap gave at input pixels: sizes of the kernel, any two axes, sizes of the input.

    Returns:
        The two axes, then sizes of the output.
    """
    axes = len(product.stride)
    kernel, inputs = t.shape[:axes], t.shape[-axes:]
    geometry = zip(inputs, kernel, product.stride, product.padding, product.dilation, strict=True)
    outputs = [(size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dilation in geometry]
    total = t.new_zeros(*t.shape[axes:-axes], *outputs)
    for tap, at_inputs, at_outputs in meetings(product, kernel, inputs, outputs):
        total[:, :, *at_outputs] += t[tap][:, :, *at_inputs]
    return total


def pull(product: Conv, t: Tensor, inputs: tuple[int, ...]) -> Tensor:
    """From output pixels to input pixels of sizes ``inputs``; shapes as those of `push`."""
    axes = len(product.stride)
    total = t.new_zeros(*t.shape[axes:-axes], *inputs)
    for tap, at_inputs, at_outputs in meetings(product, t.shape[:axes], inputs, t.shape[-axes:]):
        total[:, :, *at_inputs] += t[tap][:, :, *at_outputs]
    return total


def meetings(
    product: Conv, kernel: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...] | list[int]
) -> Iterator[tuple[tuple[int, ...], _Slices, _Slices]]:
    """Every tap, with the input pixels that it meets and the output pixels for which it meets them."""
    for tap in itertools.product(*map(range, kernel)):
        at_inputs, at_outputs = [], []
        for i, size, out, stride, pad, dilation in zip(
            tap, inputs, outputs, product.stride, product.padding, product.dilation, strict=True
        ):
            shift = i * dilation - pad  # output o meets input o·stride + shift
            first = max(0, -(shift // stride))
            end = max(first, min(out, (size - 1 - shift) // stride + 1))
            at_outputs.append(slice(first, end))
            at_inputs.append(slice(first * stride + shift, end * stride + shift, stride) if end > first else slice(0))
        yield tap, tuple(at_inputs), tuple(at_outputs)

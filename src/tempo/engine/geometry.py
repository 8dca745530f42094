"""Shapes and FLOPs of products, and where a convolution's taps meet pixels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import prod

from tempo.wire.messages import Conv, Product

Shape = tuple[int, ...]


def output_shape(product: Product, x: Shape, w: Shape) -> Shape:
    """Shape of ``Y`` for operands of shapes ``x`` and ``w``."""
    if not isinstance(product, Conv):
        return (x[0], w[0])
    spatial = (
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, pad, dilation in zip(
            x[2:], w[2:], product.stride, product.padding, product.dilation, strict=True
        )
    )
    return (x[0], w[0], *spatial)


def flops(product: Product, x: Shape, w: Shape) -> int:
    """Floating-point operations of one pass (``Y``, ``dX`` or ``dW``): two per multiplication and addition."""
    y = output_shape(product, x, w)
    return 2 * y[0] * prod(y[2:]) * prod(w)


def meetings(
    product: Conv, kernel: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...] | list[int]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]]:
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

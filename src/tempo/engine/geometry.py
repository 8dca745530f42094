"""Shapes and FLOPs of products."""

from __future__ import annotations

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

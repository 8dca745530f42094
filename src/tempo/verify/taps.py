"""What a convolution's kernel covers: sums of it with the vectors of each tap."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from tempo import kernels
from tempo.engine.geometry import output_shape
from tempo.schemes.arithmetic import input_gradient, output
from tempo.verify.sums import pieces
from tempo.wire.messages import Conv


def over_taps(
    product: Conv, t: Tensor, kernel: Tensor, lengths: Tensor, back_to: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the pixels that ``kernel`` covers at each pixel of the other side, as the convolution has them.

    Natively where channels of maps in float32 or bfloat16 lie side by side, and else by PyTorch's convolutions.

    Args:
        product: The convolution.
        t: Maps of its input, (N, channels, ...); or of its output, if ``back_to`` is given.
        kernel: (groups, k, channels of a group, sizes of the kernel), in the dtype that sums are kept in.
        lengths: Of the pixels of ``t``, (groups, pixels of all images), float64.
        back_to: Sizes of the input.

    Returns:
        Sums (groups, k, pixels); lengths (groups, pixels) of what is covered there, where a kernel has several taps of
        the longest in the image; the length (groups, 1) of all that is covered.
    """
    groups, k, channels, *taps = kernel.shape
    maps = t.movedim(1, -1)
    fits = groups == 1 and len(taps) == 2 and kernel.dtype == torch.float32 and t.dtype in kernels.DTYPES
    if fits and maps.is_contiguous() and (native := kernels.native()):
        sizes = output_shape(product, tuple(t.shape), (k, channels, *taps))[2:] if back_to is None else back_to
        sums = kernel.new_empty(k, t.shape[0], *sizes)
        covered = lengths.new_empty(sums[0].numel())
        geometry = product.stride, product.padding, product.dilation
        length = native.taps(maps, kernel[0].contiguous(), sums, lengths[0], covered, *geometry, back_to is not None)
        return sums.view(1, k, -1), covered.unsqueeze(0), lengths.new_full((1, 1), length)

    def convolved(t: Tensor, kernel: Tensor) -> Tensor:
        """By group, (groups, k, N, pixels of an image)."""
        if back_to is None:
            found = output(product, t, kernel.flatten(0, 1))
        else:
            shape = t.shape[0], groups * kernel.shape[1], *back_to
            found = input_gradient(product, t, kernel.transpose(1, 2).flatten(0, 1), shape)
        by_group: Tensor = found.unflatten(1, (groups, -1)).movedim(0, 2).flatten(3)
        return by_group

    sums = torch.cat([convolved(piece, kernel) for _, piece in pieces(t, kernel.dtype)], 2)
    squares = lengths.square().view(groups, t.shape[0], *t.shape[2:]).transpose(0, 1)
    squares = convolved(squares, lengths.new_ones(groups, 1, 1, *taps)).squeeze(1)
    length = squares.sum((1, 2)).sqrt_().unsqueeze_(1)
    if prod(taps) > 1 and squares.shape[2]:
        squares = squares.amax(2, keepdim=True).expand_as(squares)
    return sums.flatten(2), squares.flatten(1).sqrt(), length

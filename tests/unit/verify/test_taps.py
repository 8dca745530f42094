"""Sums over taps are those of the convolution, with every instruction set."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo import kernels
from tempo.schemes.arithmetic import input_gradient, output
from tempo.verify.taps import over_taps
from tempo.wire.layout import maps
from tempo.wire.messages import Conv


@pytest.fixture(params=kernels.available(), autouse=True)
def instructions(request):
    with kernels.using(request.param):
        yield request.param


@settings(deadline=None)
@given(st.data(), st.integers(1, 3), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_pixels_meet_as_in_the_convolution_and_its_gradient(data, axes, dtype):
    size, stride, padding, dilation = (
        tuple(data.draw(st.integers(low, high)) for _ in range(axes)) for low, high in ((1, 3), (1, 3), (0, 3), (1, 2))
    )
    groups, vectors, channels = (
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 40)),
    )
    product = Conv(stride, padding, dilation, groups, data.draw(st.booleans()))
    shape = (2, groups * channels, *(data.draw(st.integers(5, 8)) for _ in range(axes)))
    x = maps(product, shape, dtype).copy_(torch.randn(shape))
    work = torch.promote_types(dtype, torch.float32)
    kernel = torch.randn(groups, vectors, channels, *size, dtype=work)
    y = output(product, x.double(), kernel.double().flatten(0, 1))
    check(
        over_taps(product, x, kernel, lengths(x, groups)),
        y,
        output(product, squares(x, groups), ones(kernel)),
        prod(size),
    )

    shape_g = (2, groups * channels, *y.shape[2:])
    g = maps(product, shape_g, dtype).copy_(torch.randn(shape_g))
    dx, of_squares = (
        input_gradient(product, of, w.transpose(1, 2).flatten(0, 1), (2, groups * w.shape[1], *x.shape[2:]))
        for of, w in ((g.double(), kernel.double()), (squares(g, groups), ones(kernel).unsqueeze(1)))
    )
    check(over_taps(product, g, kernel, lengths(g, groups), tuple(x.shape[2:])), dx, of_squares, prod(size))


def squares(t: Tensor, groups: int) -> Tensor:
    """Squared lengths (N, groups, ...) of pixels."""
    return t.double().square().unflatten(1, (groups, -1)).sum(2)


def lengths(t: Tensor, groups: int) -> Tensor:
    return squares(t, groups).sqrt().transpose(0, 1).flatten(1)


def ones(kernel: Tensor) -> Tensor:
    return torch.ones(len(kernel), 1, *kernel.shape[3:], dtype=torch.float64)


def check(found: tuple[Tensor, Tensor, Tensor], expected: Tensor, covered: Tensor, taps: int) -> None:
    """Against the convolution, and against that of squares (N, groups, ...)."""
    sums, longest, length = found
    groups = len(sums)
    expected = expected.unflatten(1, (groups, -1)).movedim(0, 2).flatten(2)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(length[:, 0].square(), covered.transpose(0, 1).flatten(1).sum(1))
    of_images = covered.flatten(2)
    if taps > 1:
        of_images = of_images.amax(2, keepdim=True).expand_as(of_images)
    torch.testing.assert_close(longest, of_images.transpose(0, 1).flatten(1).sqrt())

"""Sums over taps are those of the convolution."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo.schemes.arithmetic import input_gradient, output
from tempo.verify.taps import pull, push
from tempo.wire.messages import Conv


@given(st.data(), st.integers(1, 3))
def test_pixels_meet_as_in_the_convolution_and_its_gradient(data, axes):
    kernel, stride, padding, dilation = (
        tuple(data.draw(st.integers(low, high)) for _ in range(axes)) for low, high in ((1, 3), (1, 3), (0, 3), (1, 2))
    )
    product = Conv(stride, padding, dilation, 1)
    x = torch.randn(2, 3, *(data.draw(st.integers(5, 8)) for _ in range(axes)), dtype=torch.float64)
    w = torch.randn(4, 3, *kernel, dtype=torch.float64)
    y = output(product, x, w)
    taps = torch.einsum("nc...,oct->tonc...", x, w.flatten(2)).sum(3).unflatten(0, kernel)
    torch.testing.assert_close(push(product, taps).transpose(0, 1), y)
    g = torch.randn_like(y)
    taps = torch.einsum("no...,oct->tcno...", g, w.flatten(2)).sum(3).unflatten(0, kernel)
    expected = input_gradient(product, g, w, tuple(x.shape))
    torch.testing.assert_close(pull(product, taps, tuple(x.shape[2:])).transpose(0, 1), expected)

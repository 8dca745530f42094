"""Convolutions sent as patches: the same numbers, as matrices, and only where that is possible."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tempo.engine.patches import patches
from tempo.wire.messages import Conv, Linear

CONVOLUTIONS = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


@given(st.data(), st.integers(1, 3))
def test_patches_times_the_flat_weight_are_the_convolution(data, axes):
    kernel, stride, padding, dilation = (
        tuple(data.draw(st.integers(low, high)) for _ in range(axes)) for low, high in ((1, 3), (1, 3), (0, 2), (1, 2))
    )
    x = torch.randn(2, 3, *(data.draw(st.integers(5, 8)) for _ in range(axes)), dtype=torch.float64)
    w = torch.randn(4, 3, *kernel, dtype=torch.float64)
    rows = patches(x, Conv(stride, padding, dilation, 1), kernel)
    y = CONVOLUTIONS[axes](x, w, None, stride, padding, dilation)
    torch.testing.assert_close((rows @ w.flatten(1).T).movedim(-1, 1), y)


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    "options", [{"scheme": "mix-tuned"}, {"scheme": "mix", "unfold": True}, {"scheme": "tempo", "unfold": True}]
)
@pytest.mark.parametrize("layer", [nn.Conv2d(40, 48, 3, padding=1, stride=2), nn.Conv1d(40, 48, 5, dilation=2)])
def test_unfolded_convolutions_give_the_numbers_of_plain_pytorch(connect, options, layer):
    session = connect(base="secret", **options)
    protected = session.protect(copy.deepcopy(layer).double())
    x = torch.randn(4, 40, *[12] * (layer.weight.dim() - 2), dtype=torch.float64)
    for actual, expected in zip(gradients(protected, x), gradients(copy.deepcopy(layer).double(), x), strict=True):
        assert float((actual - expected).norm() / expected.norm()) < 1e-12
    stats = session.stats()
    assert stats.flops_trusted == 0 < stats.flops_offloaded
    assert list(protected._tempo._products) == [Linear()]


def test_grouped_spatial_convolutions_stay_trusted_under_mix_tuned_and_say_why(connect):
    session = connect(scheme="mix-tuned")
    model = session.protect(nn.Conv2d(96, 96, 3, groups=2))
    model(torch.randn(2, 96, 5, 5))
    (line,) = session.summary().lines
    assert line.offloaded == 0 < line.trusted
    assert "gives its masks away" in line.reason

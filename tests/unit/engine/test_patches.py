"""Convolutions sent as patches: the same numbers, as matrices, and only where that is possible."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tempo import kernels
from tempo.engine.patches import patches
from tempo.wire.messages import Conv, Linear

CONVOLUTIONS = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


@pytest.mark.parametrize("kernels_of", kernels.available())
@settings(deadline=None, max_examples=25)
@given(st.data(), st.integers(1, 3), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([3, 70]))
def test_patches_times_the_flat_weight_are_the_convolution(kernels_of, data, axes, dtype, channels):
    kernel, stride, padding, dilation = (
        tuple(data.draw(st.integers(low, high)) for _ in range(axes))
        for low, high in ((1, 3 if axes > 1 else 40), (1, 3), (0, 2), (1, 2))
    )
    least = max(kernel) * 2 + 1
    x = torch.randn(2, channels, *(data.draw(st.integers(least, least + 2)) for _ in range(axes)), dtype=dtype)
    if data.draw(st.booleans()):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    w = torch.randn(4, channels, *kernel, dtype=dtype)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain = CONVOLUTIONS[axes](expected, w, None, stride, padding, dilation)
    with kernels.using(kernels_of):
        y = (patches(found, Conv(stride, padding, dilation, 1), kernel) @ w.flatten(1).T).movedim(-1, 1)
        for result in (y, plain):
            result.backward(torch.ones_like(result))
    for actual, wanted in ((y.detach(), plain.detach()), (found.grad, expected.grad)):
        assert actual.shape == wanted.shape
        assert float((actual - wanted).norm()) <= (1e-5 if dtype == torch.float32 else 1e-13) * float(wanted.norm())


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

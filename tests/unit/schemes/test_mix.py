"""Scheme `mix` as a user meets it: safe sizes, shield rows, layers that stay trusted, the numbers of plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tempo import schemes
from tempo.errors import UnsafeError
from tempo.keys import KeySchedule
from tempo.schemes.base import Problem, Target
from tempo.settings import parse
from tempo.wire.messages import Linear


def relative(a, b):
    return float((a - b).norm() / b.norm())


def run(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("sizes", [{"mix_block": 7}, {"mix_row_block": 15}])
def test_blocks_known_to_be_undone_are_refused(sizes):
    with pytest.raises(UnsafeError, match=next(iter(sizes))):
        schemes.create("mix", parse(sizes))
    schemes.create("mix", parse(sizes | {"insecure_small_blocks": True}))


def test_a_layer_narrower_than_a_block_stays_trusted_and_says_why(connect):
    session = connect(scheme="mix")
    model = session.protect(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 10), nn.Linear(10, 40)))
    model(torch.randn(5, 64))
    wide, narrow, narrow_input = session.summary().lines
    assert wide.trusted == 0 < wide.offloaded
    assert narrow.offloaded == narrow_input.offloaded == 0
    assert "10 output features" in narrow.reason
    assert "10 input features" in narrow_input.reason


@pytest.mark.parametrize("options", [{}, {"mix_rounds": 2}, {"mix_condition": 4.0}, {"mix_rounds": 2, "mix_block": 40}])
@pytest.mark.parametrize("rows", [1, 33, 150])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_linear_at_safe_sizes(connect, options, rows, dtype, bound):
    torch.manual_seed(0)
    session = connect(2, scheme="mix", **options)
    plain = nn.Linear(67, 101).to(dtype)
    protected = session.protect(copy.deepcopy(plain))
    x = torch.randn(rows, 67, dtype=dtype)
    for actual, expected in zip(run(protected, x), run(plain, x), strict=True):
        assert relative(actual, expected) <= bound
    assert session.stats().flops_trusted == 0


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_convolution_at_safe_sizes(connect, groups, batch, dtype, bound):
    torch.manual_seed(0)
    session = connect(2, scheme="mix")
    plain = nn.Conv2d(72, 66, 3, padding=1, stride=2, groups=groups).to(dtype)
    protected = session.protect(copy.deepcopy(plain))
    x = torch.randn(batch, 72, 5, 6, dtype=dtype)
    for actual, expected in zip(run(protected, x), run(plain, x), strict=True):
        assert relative(actual, expected) <= bound
    assert session.stats().flops_trusted == 0


def encoded(x, w):
    keys, target = KeySchedule(), Target(0, "operator", 1.0)

    def empty(worker, shape, dtype):
        return torch.empty(shape, dtype=dtype)

    weight = schemes.create("mix").encode_weight(Problem(Linear(), x.dtype), w, keys.fresh(1, "w"), [target], empty)
    source = weight.encode_input(x, keys.fresh(1, "x"), [target], empty, lambda: w)
    g = torch.zeros(len(x), len(w))
    gradient = source.encode_gradient(g, keys.fresh(1, "g"), empty, lambda: x, lambda: w, want_dw=True)
    return weight, source, gradient


def test_few_rows_are_filled_up_with_random_ones_never_zero():
    _, source, gradient = encoded(torch.randn(3, 40), torch.randn(50, 40))
    shield = source.secrets(0)["x_shield"]
    assert shield.shape == (29, 40)
    assert 0.9 < float(shield.norm(dim=1).mean()) / 40**0.5 < 1.2
    x, g = source.operands[0].tensors["x"], gradient.operands[0].tensors["g"]
    assert x.shape == (32, 40)
    assert torch.linalg.matrix_rank(x) == 32
    assert g.shape == (32, 50)
    assert g.count_nonzero() == g.numel()
    # A gradient that is zero stays so for any optimizer.
    x, g = x.double(), g.double()
    (dw,) = gradient.decode_weight_gradient({0: (g.T @ x).float()}, [50])
    assert float(dw.abs().max()) < 1e-18


def test_zeros_and_signs_of_the_input_do_not_survive():
    _, source, _ = encoded(torch.relu(torch.randn(64, 64)), torch.randn(64, 64))
    masked = source.operands[0].tensors["x"]
    assert masked.count_nonzero() == masked.numel()
    assert 0.4 < float((masked > 0).double().mean()) < 0.6

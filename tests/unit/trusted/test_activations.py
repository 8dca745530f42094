"""GELU and SiLU by native kernels against PyTorch, in every instruction set that there is."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tempo import kernels
from tempo.trusted.mode import TrustedMode

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@pytest.fixture(params=kernels.available())
def isa(request):
    with kernels.using(request.param):
        yield request.param


def within(function, x):
    with TrustedMode():
        return function(x)


def ran_natively(y, isa):
    """Whether what made ``y`` is what should have, so that no test compares PyTorch with itself."""
    return (type(y.grad_fn).__name__ == "_ActivationBackward") == (isa != kernels.TORCH)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("start", [0, 1])  # aligned and not
def test_values_and_gradients_are_those_of_pytorch(isa, name, start):
    torch.manual_seed(0)
    function = ACTIVATIONS[name]
    x = torch.cat([torch.linspace(-15, 15, 300_001), 3 * torch.randn(1001)])[start:].requires_grad_()
    g = torch.randn_like(x)
    y = within(function, x)
    assert ran_natively(y, isa)
    y.backward(g)
    exact = x.detach().double().requires_grad_()
    function(exact).backward(g.double())
    error = (y - function(exact)).abs() / exact.abs().clamp(min=1)
    assert error.max() < 4e-7
    assert ((x.grad - exact.grad).abs() <= 4e-6 * g.abs()).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 31, 33])
def test_short_tensors(isa, name, size):
    torch.manual_seed(0)
    x = torch.randn(size)
    torch.testing.assert_close(within(ACTIVATIONS[name], x), ACTIVATIONS[name](x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_is_not_finite_is_not_hidden(isa, name):
    x = torch.tensor([float("nan"), float("inf"), 1e30, -1e30, 0.0] * 7, requires_grad=True)
    y = within(ACTIVATIONS[name], x)
    expected = ACTIVATIONS[name](x)
    # Of infinity, PyTorch makes infinity or NaN, by the processor.
    assert torch.equal(y.isfinite(), expected.isfinite())
    torch.testing.assert_close(y[y.isfinite()], expected[y.isfinite()])
    (got,), (wanted,) = (torch.autograd.grad(out.sum(), x) for out in (y, expected))
    assert torch.equal(got.isfinite(), wanted.isfinite())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_gradients(isa, name):
    torch.manual_seed(0)
    x = torch.randn(50, requires_grad=True)
    results = []
    for y in (within(ACTIVATIONS[name], x), ACTIVATIONS[name](x)):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_other_types_and_layouts_are_left_to_pytorch(isa, name):
    function = ACTIVATIONS[name]
    for x in (torch.randn(8, dtype=torch.float64), torch.randn(8).bfloat16(), torch.randn(4, 6).t()):
        assert torch.equal(within(function, x), function(x))


def test_in_place_stays_in_place(isa):
    x = torch.randn(8)
    before = x.clone()
    assert within(lambda t: F.silu(t, inplace=True), x) is x
    assert not torch.equal(x, before)


def test_recomputation_may_happen_outside(isa):
    torch.manual_seed(0)
    x = torch.randn(6, 10, requires_grad=True)
    y = within(lambda t: checkpoint(F.gelu, t, use_reentrant=False), x)
    y.sum().backward()
    (expected,) = torch.autograd.grad(F.gelu(x).sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_threads_change_nothing(isa):
    torch.manual_seed(0)
    x = torch.randn(700_001)
    alone = within(F.gelu, x)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(within(F.gelu, x), alone) or isa == kernels.TORCH
    finally:
        torch.set_num_threads(threads)


def test_func_transforms_see_pytorch(isa):
    x = torch.randn(5)
    gradient = within(torch.func.grad(lambda t: F.gelu(t).sum()), x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda t: F.gelu(t).sum())(x))

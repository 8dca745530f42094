"""Attention by native kernels against PyTorch, in every instruction set that there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tempo import kernels
from tempo.engine.autograd import joined
from tempo.trusted.mode import TrustedMode


@pytest.fixture(params=kernels.available())
def isa(request):
    with kernels.using(request.param):
        yield request.param


def operands(samples, heads, queries, keys, width, layout="tokens first"):
    torch.manual_seed(0)
    if layout == "heads first":
        made = [torch.randn(samples, heads, tokens, width) for tokens in (queries, keys, keys)]
    else:
        made = [torch.randn(samples, tokens, heads, width).transpose(1, 2) for tokens in (queries, keys, keys)]
    return [t.requires_grad_() for t in made]


def within(*args, **kwargs):
    with TrustedMode():
        return F.scaled_dot_product_attention(*args, **kwargs)


def native(out):
    return type(out.grad_fn).__name__ == "_AttentionBackward"


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 65, 65, 64), {}),
        ((1, 2, 256, 256, 32), {}),
        ((1, 2, 200, 200, 48), {"is_causal": True}),
        ((1, 1, 700, 700, 16), {"is_causal": True}),
        ((2, 2, 7, 130, 16), {"scale": 0.5}),
        ((1, 1, 30, 9, 16), {"is_causal": True}),
        ((1, 1, 97, 1, 16), {}),
        ((3, 1, 1, 17, 80), {"scale": 0.3}),
    ],
)
@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
def test_values_and_gradients_are_those_of_pytorch(isa, shape, options, layout):
    q, k, v = operands(*shape, layout)
    out = within(q, k, v, **options)
    assert native(out) == (isa != kernels.TORCH)
    g = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), g)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, **options)
    wanted = torch.autograd.grad(expected, exact, g.double())
    for ours, theirs in zip((out, *got), (expected, *wanted), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=4e-6)


@pytest.mark.parametrize("isa_name", kernels.available())
@given(
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    queries=st.integers(1, 150),
    keys=st.integers(1, 150),
    causal=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_queries_may_share_heads_of_keys(isa_name, groups, kv_heads, queries, keys, causal):
    (q, *_), (_, k, v) = operands(2, kv_heads * groups, queries, keys, 16), operands(2, kv_heads, queries, keys, 16)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    with kernels.using(isa_name):
        out = within(q, k, v, is_causal=causal, enable_gqa=True)
        assert native(out) == (isa_name != kernels.TORCH)
        g = torch.randn_like(out)
        got = torch.autograd.grad(out, (q, k, v), g)
    expected = F.scaled_dot_product_attention(*exact, is_causal=causal, enable_gqa=True)
    wanted = torch.autograd.grad(expected, exact, g.double())
    for ours, theirs in zip((out, *got), (expected, *wanted), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa_name", kernels.available())
@given(
    groups=st.integers(1, 2),
    queries=st.integers(1, 150),
    keys=st.integers(128, 300),
    width=st.integers(1, 6).map(lambda n: 16 * n),
    causal=st.booleans(),
    size=st.sampled_from([1e-30, 1.0, 30.0]),
)
@settings(max_examples=15, deadline=None)
def test_as_accurate_as_float32(isa_name, groups, queries, keys, width, causal, size):
    (q, *_), (_, k, v) = operands(1, groups, queries, keys, width), operands(1, 1, queries, keys, width)
    v = (v.detach() * size).requires_grad_()
    g = torch.randn_like(q)

    def results(function, tensors):
        out = function(*tensors, is_causal=causal, enable_gqa=True)
        return out, *torch.autograd.grad(out, tensors, g.to(out.dtype))

    with kernels.using(isa_name):
        ours = results(within, (q, k, v))
    theirs = results(F.scaled_dot_product_attention, (q, k, v))
    exact = results(F.scaled_dot_product_attention, [t.detach().double().requires_grad_() for t in (q, k, v)])
    for got, single, wanted in zip(ours, theirs, exact, strict=True):
        floor = 5e-7 * wanted.norm() + 1e-6 * size * wanted.numel() ** 0.5  # gradients may cancel
        assert (got - wanted).norm() <= 1.5 * (single - wanted).norm() + floor


@pytest.mark.parametrize("heads", [(3, 3), (4, 2)])
def test_gradients_of_what_was_projected_together_are_one_matrix(isa, heads):
    (q, *_), (_, k, v) = operands(2, heads[0], 9, 9, 16), operands(2, heads[1], 9, 9, 16)
    out = within(q, k, v, enable_gqa=True)
    got = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    parts = [t.transpose(1, 2).reshape(18, -1) for t in got]
    assert (joined(parts).data_ptr() == parts[0].data_ptr()) == native(out)
    assert torch.equal(joined(parts), torch.cat(parts, 1))


def test_heads_that_do_not_fit_are_refused_as_pytorch_does(isa):
    (q, *_), (_, k, v) = operands(1, 3, 8, 8, 16), operands(1, 2, 8, 8, 16)
    with pytest.raises(RuntimeError):
        within(q, k, v, enable_gqa=True)


def test_large_scores_do_not_overflow(isa):
    q, k, v = operands(1, 1, 5, 40, 16)
    out = within(q * 100, k * 100, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q * 100, k * 100, v), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("keys", [40, 140])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_what_is_not_finite_is_not_hidden(isa, where, keys, value):
    tensors = [t.detach().clone() for t in operands(1, 2, 5, keys, 16)]
    tensors[where][0, 0, 3, 2] = value
    expected = F.scaled_dot_product_attention(*tensors)
    torch.testing.assert_close(within(*tensors), expected, rtol=1e-4, atol=4e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 2, 8, 8, 16), {"attn_mask": torch.ones(8, 8, dtype=torch.bool).tril()}),
        ((1, 2, 8, 8, 10), {}),
        ((1, 2, 8, 600, 16), {}),
        ((1, 2, 0, 8, 16), {}),
        ((1, 2, 8, 8, 16), {"scale": -1.0}),
    ],
)
def test_the_rest_is_left_to_pytorch(isa, shape, options):
    q, k, v = operands(*shape)
    out = within(q, k, v, **options)
    assert not native(out)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, **options))


def test_dropout_is_pytorchs(isa):
    q, k, v = operands(1, 2, 8, 8, 16)
    results = []
    for function in (within, F.scaled_dot_product_attention):
        torch.manual_seed(1)
        results.append(function(q, k, v, dropout_p=0.5))
    assert torch.equal(*results)


def test_gradients_that_are_expanded(isa):
    q, k, v = operands(2, 2, 9, 9, 16)
    got = torch.autograd.grad(within(q, k, v).sum(), (q, k, v))
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), (q, k, v))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_recomputation_may_happen_outside(isa):
    q, k, v = operands(2, 2, 9, 12, 16)
    with TrustedMode():
        out = checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=False)
    got = torch.autograd.grad(out.sum(), (q, k, v))
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), (q, k, v))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_threads_change_nothing(isa):
    q, k, v = (t.detach() for t in operands(5, 2, 33, 33, 16))
    alone = within(q, k, v)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(within(q, k, v), alone) or isa == kernels.TORCH
    finally:
        torch.set_num_threads(threads)

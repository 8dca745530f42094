"""Weights as integers: near the weight, of one length for all features, and the same whoever makes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo.wire.integers import RMS, integers

BITS = st.integers(2, 16)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Of any scale, with features of zeros and features with outliers among them."""
    m, d = draw(st.integers(1, 40)), draw(st.integers(1, 90))
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    w = torch.randn(m, d) * 10.0 ** torch.randint(*draw(st.sampled_from([(-2, 3), (-44, 38)])), (m, 1))
    w[torch.arange(m), torch.randint(d, (m,))] *= draw(st.sampled_from([1.0, 30.0]))
    return w.clamp(-3e38, 3e38) * (torch.rand(m, 1) > 0.1)


@settings(deadline=None)
@given(weights(), BITS)
def test_integers_are_within_half_a_step_and_of_so_many_bits(w: Tensor, bits: int) -> None:
    w_q, scales = integers(w, bits)
    assert w_q.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert int(w_q.int().abs().max()) < 1 << (bits - 1)
    whole = scales.flatten() >= torch.finfo(torch.float32).tiny  # below, float32 has few bits for a scale
    near = w_q.double() * scales.double()
    assert bool(((near - w).abs() <= 0.5001 * scales)[whole].all())


@settings(deadline=None)
@given(weights(), BITS, st.randoms())
def test_they_depend_on_their_own_feature_alone_and_on_no_order(w: Tensor, bits: int, random) -> None:
    """Another machine sums in another order; a group's weight is a concatenation of its layers'."""
    w_q, scales = integers(w, bits)
    columns = random.sample(range(w.shape[1]), w.shape[1])
    again, again_scales = integers(w[:, columns], bits)
    assert torch.equal(again, w_q[:, columns])
    assert torch.equal(again_scales, scales)
    parts = [integers(part, bits) for part in w.split(3)]
    assert torch.equal(torch.cat([part[0] for part in parts]), w_q)
    assert torch.equal(torch.cat([part[1] for part in parts]), scales)


@pytest.mark.parametrize("bits", range(8, 17))
def test_no_feature_is_longer_than_others_and_only_far_outliers_make_one_shorter(bits: int) -> None:
    """The longest feature makes the steps of rows as coarse as they are."""
    torch.manual_seed(0)
    w = torch.randn(300, 400) * torch.logspace(-3, 3, 300)[:, None]
    w[:10, 0] = 100 * w[:10].square().mean(1).sqrt()
    rms = integers(w, bits)[0].double().square().mean(1).sqrt()
    wanted = torch.full_like(rms, RMS << max(0, bits - 9))
    assert bool((rms <= 1.01 * wanted).all())
    assert bool((rms[:10] < 0.5 * wanted[:10]).all())
    assert bool((rms[10:] > 0.6 * wanted[10:]).all())
    if bits > 8:  # there is room for all but far outliers
        torch.testing.assert_close(rms[10:], wanted[10:], rtol=0.01, atol=0)

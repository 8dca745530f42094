"""Output features divided over two operators: who gets what, and that nothing but the sum is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import empty, plain, run, targets
from torch import nn

from tempo.keys import KeySchedule
from tempo.schemes.base import Problem
from tempo.schemes.mix import Mix
from tempo.schemes.mix_tuned import MixTuned
from tempo.wire.messages import Conv, Linear

UNHURRIED = settings(deadline=None, max_examples=25)
SMALL = MixTuned(2, 2, cloak=1, dense_below=0, insecure_small_blocks=True)


def test_each_operator_gets_a_half_under_masks_of_its_own():
    torch.manual_seed(0)
    x, w, g = torch.randn(64, 40), torch.randn(101, 40), torch.randn(64, 101)
    found = run(MixTuned(), x, w, g, workers=targets("one", "other", "one"))
    assert {worker: len(part) for worker, part in found.seen["w"].items()} == {0: 50, 1: 51, 2: 50}
    one, other, again = (found.source.secrets(worker) for worker in range(3))
    columns = torch.cat([one["columns"], other["columns"]])
    assert torch.equal(columns.sort().values, torch.arange(101))
    assert torch.equal(one["columns"], again["columns"])  # two workers of one operator hold the same
    assert torch.equal(found.seen["w"][0], found.seen["w"][2])
    for mask in ("a_permutation", "a_blocks0", "l_permutation", "cloak_v"):
        assert not torch.equal(one[mask], other[mask])
    # One operator's workers divide the rows; the other's gets all of them.
    assert [len(found.seen["x"][worker]) for worker in range(3)] == [32, 64, 48]


def test_the_halves_are_drawn_anew():
    w = torch.randn(80, 40)
    drawn = {
        tuple(
            MixTuned()
            .encode_weight(
                Problem(Linear(), torch.float32), w, KeySchedule().fresh(1, "w"), targets("one", "other"), empty
            )
            .operands[0]
            .columns.tolist()
        )
        for _ in range(5)
    }
    assert len(drawn) == 5


@pytest.mark.parametrize(("outputs", "holders"), [(63, {0}), (64, {0, 1})])
def test_a_weight_too_narrow_to_divide_goes_to_one_operator_alone(outputs, holders):
    x, w, g = torch.randn(64, 40), torch.randn(outputs, 40), torch.randn(64, outputs)
    found = run(MixTuned(), x, w, g, workers=targets("one", "other"))
    assert set(found.seen["x"]) == set(found.seen["w"]) == holders


def test_one_operator_or_a_scheme_that_does_not_divide_leaves_weights_whole():
    x, w, g = torch.randn(64, 40), torch.randn(80, 40), torch.randn(64, 80)
    assert len(run(MixTuned(), x, w, g, workers=targets("one", "one")).seen["w"][0]) == 80
    assert len(run(Mix(), x, w, g, workers=targets("one", "other")).seen["w"][1]) == 80


@UNHURRIED
@given(st.data(), st.integers(1, 3), st.sampled_from([("a", "b"), ("b", "a", "b"), ("a", "b", "b", "a")]))
def test_the_numbers_are_those_of_the_whole(data, groups, operators):
    torch.manual_seed(0)
    inputs, outputs = groups * data.draw(st.integers(2, 5)), groups * data.draw(st.integers(2, 9))
    x = torch.randn(data.draw(st.integers(1, 9)), inputs, 6, dtype=torch.float64)
    w = torch.randn(outputs, inputs // groups, 2, dtype=torch.float64)
    product = Conv((1,), (1,), (2,), groups)
    if data.draw(st.booleans()):
        x, w, product = x[..., 0], torch.randn(outputs, inputs, dtype=torch.float64), Linear()
    y, g, dx, dw = plain(product, x, w)
    found = run(SMALL, x, w, g, product, targets(*operators))
    for actual, expected in ((found.y, y), (found.dx, dx), (found.dw, dw)):
        assert float((actual - expected).norm()) <= 1e-13 * float(
            x.norm() * w.norm() + g.norm() * (w.norm() + x.norm())
        )


def test_a_small_product_still_goes_to_two_operators(connect):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 80), torch.randn(40, 64)
    session = connect(3, 2, scheme="mix-tuned", divide_flops=1 << 40)
    model = session.protect(copy.deepcopy(layer))
    links = session._engine.links
    before = [link.bytes_received for link in links]
    y = model(x)
    used = [link.address.operator for link, old in zip(links, before, strict=True) if link.bytes_received > old]
    assert sorted(used) == ["operator0", "operator1"]
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)

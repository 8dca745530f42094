"""What things take is measured with the scheme's own masks, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

from tempo import kernels, schemes
from tempo.engine.costs import ELEMENTS, MeasuredCosts, sample
from tempo.engine.geometry import flops
from tempo.wire.messages import Conv, Linear

CONV = Conv((2, 1), (1, 0), (1, 2), 2)


@pytest.mark.parametrize("name", schemes.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_scheme_has_a_price_for_every_operand_and_answer(name, dtype):
    costs = MeasuredCosts("auto", ["one", "two"])
    state = torch.random.get_rng_state()
    for product, x, w in ((Linear(), (40, 64), (48, 64)), (CONV, (4, 64, 9, 9), (64, 32, 3, 3))):
        if (scheme := schemes.create(name)).refuses(product, x, w):
            continue
        found = costs.rates(scheme, product, x, w, dtype)
        for prices in (found.mask, found.check, found.call):
            assert prices.keys() == {"w", "x", "y", "g", "dx", "dw"}
            assert all(seconds >= 0 for seconds in prices.values())
        assert found.flop > 0
        mask, check = found.seconds({"x": 1e6, "dw": 1e6}, 1.0)
        assert found.seconds({"x": 2e6, "dw": 2e6}, 1.0) >= (mask, check) >= (found.seconds({"x": 1e6}, 0.0)[0], 0.0)
    assert torch.equal(torch.random.get_rng_state(), state)  # the user's generator is not drawn from


def test_a_layer_divided_over_operators_is_sent_its_input_by_each():
    rates = [
        MeasuredCosts("auto", operators).rates(schemes.create("mix-tuned"), Linear(), (64, 64), (64, 64), torch.float32)
        for operators in (["one", "one"], ["one", "two"])
    ]
    assert [found.copies["x"] for found in rates] == [1, 2]
    assert [found.copies["y"] for found in rates] == [1, 1]


def test_layers_of_one_class_are_measured_once():
    costs, scheme = MeasuredCosts("auto", ["one"]), schemes.create("tempo")
    found = costs.rates(scheme, Linear(), (8000, 2048), (4096, 2048), torch.float32)
    spent = costs.spent
    assert costs.rates(scheme, Linear(), (9000, 1024), (2048, 1024), torch.float32) is found
    assert costs.spent == spent
    assert costs.rates(scheme, Linear(), (9000, 64), (2048, 64), torch.float32) is not found


@pytest.mark.parametrize("rows", [1, 2, 31, 100_000])
@pytest.mark.parametrize(
    ("product", "x", "w"),
    [
        (Linear(), (4096,), (1024, 4096)),
        (Linear(), (3,), (1, 3)),
        (CONV, (512, 56, 56), (256, 256, 3, 3)),
        (CONV, (2, 9, 5), (2, 1, 3, 3)),
        (Conv((1,), (0,), (1,), 1), (128, 100_000), (128, 128, 7)),
        (Conv((1, 1, 1), (0, 0, 0), (1, 1, 1), 1), (16, 64, 64, 64), (16, 16, 3, 3, 3)),
    ],
)
def test_samples_are_small_and_valid(rows, product, x, w):
    small_x, small_w = sample(product, (rows, *x), w)
    assert len(small_x) == len(x) + 1
    assert all(a <= b for a, b in zip((*small_x, *small_w), (rows, *x, *w), strict=True))
    assert flops(product, small_x, small_w) > 0
    assert torch.Size(small_x).numel() <= 2 * ELEMENTS


def test_masks_are_measured_with_the_kernels_in_use():
    # Every instruction set is one more way to mask, and each has to be measured without an error.
    for name in kernels.available():
        with kernels.using(name):
            costs = MeasuredCosts("auto", ["one"])
            assert costs.rates(schemes.create("mix"), Linear(), (64, 64), (64, 64), torch.float32).flop > 0

"""Linking: permuted weights are one weight over time, mixed ones are strangers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempo.audit.attacks.linking import LEAKS, Linking
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import FeaturesReused
from tempo.audit.knowledge import Knowledge


def run(evidence):
    return Linking().run(evidence.view, Knowledge(), evidence.truth)


def test_rows_are_linked_over_steps_of_tempo_although_the_weight_trains():
    finding = run(basecase.record(basecase.network(), steps=5, lr=0.5, scheme="tempo"))
    assert finding.verdict == "broken"
    linked, rows, columns = finding.figures
    assert linked.value == rows.value > 0.99
    assert columns.value > 0.99
    assert rows.chance == pytest.approx(2 / (128 + 64))
    curve = finding.curves[0]
    assert curve.x == [1.0, 2.0, 4.0]
    assert min(curve.series["rows linked"]) > 0.99


def test_convolutions_and_groups_are_linked():
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(12, 24, 3), nn.GELU(), nn.Conv2d(24, 12, 1))
    assert (
        run(basecase.record(convolutions, inputs=torch.randn(16, 12, 5, 5), steps=3, scheme="tempo")).figures[0].value
        == 1.0
    )
    attention = basecase.record(basecase.Attention(), inputs=torch.randn(24, 16, 64), steps=6, scheme="tempo")
    assert run(attention).figures[0].value == 1.0


def test_signs_of_features_do_not_hide_rows():
    finding = run(basecase.record(basecase.network(), steps=3, lr=0.1, scheme="tempo-signed"))
    assert finding.figures[0].value > 0.99


@pytest.mark.parametrize("rounds", [1, 2])
def test_rows_of_mixed_weights_are_not_linked(rounds):
    finding = run(basecase.record(basecase.network(), steps=3, scheme="mix", mix_rounds=rounds))
    assert finding.verdict == "resisted"
    assert finding.figures[0].value < LEAKS / 2


@pytest.mark.parametrize("rounds", [1, 2])
def test_fresh_masks_of_a_spatial_convolution_are_linked_whatever_the_mixing(rounds):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.GELU(), nn.Conv2d(48, 32, 1))
    inputs = torch.randn(96, 32, 4, 4)
    finding = run(basecase.record(network, inputs=inputs, steps=3, lr=0.1, scheme="mix", mix_rounds=rounds))
    found = {figure.name: figure.value for figure in finding.figures}
    assert finding.verdict == "broken"
    assert found["masks of convolutions linked"] > 0.99
    assert found["rows linked between steps"] < 0.2


def test_a_reused_mask_links_itself():
    finding = run(basecase.record(basecase.network(), steps=3, masks=FeaturesReused(32)))
    assert finding.figures[0].value == 1.0


def test_one_masked_weight_has_nothing_to_be_linked_with():
    finding = run(basecase.record(basecase.network(), steps=1, scheme="tempo"))
    assert finding.verdict == "not applicable"
    assert "twice" in finding.reason

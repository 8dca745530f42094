"""Directions: exact on permutations and scales, and where one axis alone is mixed; blind where both are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempo.audit.attacks.directions import Directions, match_lines
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import InputsMixed, OneSided


def figures(evidence):
    finding = Directions().run(evidence.view, evidence.knowledge, evidence.truth)
    return finding, {figure.name: figure.value for figure in finding.figures}


@pytest.mark.parametrize("drift", [0.01, 0.1])
def test_weights_under_permutations_and_scales_are_recovered(drift):
    finding, found = figures(basecase.record(basecase.network(), drift, scheme="tempo"))
    assert finding.verdict == "broken"
    assert found["rows assigned correctly"] == found["columns assigned correctly"] == 1.0
    assert found["delta error"] < 0.2


def test_mixing_inputs_alone_leaves_the_directions_of_rows_to_one_another():
    evidence = basecase.record(basecase.network(64, 256, 64), 0.05, masks=InputsMixed(64))
    finding, found = figures(evidence)
    assert finding.verdict == "broken"
    assert found["rows assigned correctly"] == 1.0
    # What of the change looks like a rotation stays unknown, (d-1)/2m of its energy, and what looks like scales.
    assert 0.25 < found["delta error"] < 0.5
    assert all(error < 0.5 for error in finding.curves[0].series["delta error"][1:])


def test_groups_and_convolutions_are_matched():
    attention = basecase.record(basecase.Attention(), 0.05, inputs=torch.randn(24, 16, 64), steps=4, scheme="tempo")
    assert figures(attention)[1]["rows and columns assigned correctly"] == 1.0
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 48, 1))
    for fields in ({"scheme": "tempo"}, {"masks": InputsMixed(16)}):
        _, found = figures(basecase.record(network, 0.05, inputs=torch.randn(16, 16, 6, 6), **fields))
        assert found["rows assigned correctly"] == 1.0
        assert found["delta error"] < 0.4


@pytest.mark.parametrize("masks", [OneSided(32), None])
def test_mixing_both_axes_of_the_weight_leaves_no_direction(masks):
    finding, found = figures(basecase.record(basecase.network(), 0.05, scheme="mix", masks=masks))
    assert finding.verdict == "resisted"
    assert found["delta error"] > 5
    assert found.get("rows assigned correctly", 0.0) < 0.15


def test_lines_are_matched_through_a_secret_rotation():
    generator = torch.Generator().manual_seed(0)
    public = torch.randn(40, 24, 1, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64)).Q
    order = torch.randperm(40, generator=generator)
    masked = torch.einsum("ab,ibk->iak", rotation, public[order]) * torch.rand(40, 1, 1, generator=generator).add(0.1)
    assert torch.equal(match_lines(masked, public), order)


def test_without_the_truth_nothing_is_claimed():
    evidence = basecase.record(basecase.network(), 0.05, scheme="tempo")
    assert Directions().run(evidence.view, evidence.knowledge, None).verdict == "not scored"

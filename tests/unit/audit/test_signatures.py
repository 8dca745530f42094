"""Signatures: exact on permutations and scales of matrices, groups and convolutions; blind under mixing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tempo.audit.attacks.signatures import Signatures, fit_scales, undo
from tempo.audit.controls import basecase
from tempo.audit.knowledge import Knowledge


def figures(evidence):
    finding = Signatures().run(evidence.view, evidence.knowledge, evidence.truth)
    return finding, {figure.name: figure.value for figure in finding.figures}


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 48, 1), nn.GELU(), nn.Conv2d(48, 16, 3, stride=2)
    )


@pytest.mark.parametrize("drift", [0.005, 0.05, 0.1])
def test_permutations_scales_and_the_private_change_are_recovered_from_tempo(drift):
    finding, found = figures(basecase.record(basecase.network(), drift, scheme="tempo"))
    assert finding.verdict == "broken"
    assert found["rows assigned correctly"] == found["columns assigned correctly"] == 1.0
    # Scales can only be fitted through the private change itself: sqrt(1/m + 1/d) of it stays unknown.
    assert found["delta error"] < 0.2
    assert found["cosine with the private change"] > 0.97


def test_signs_are_recovered_by_magnitudes():
    finding, found = figures(basecase.record(basecase.network(), 0.05, scheme="tempo-signed"))
    assert finding.verdict == "broken"
    assert found["rows assigned correctly"] == found["columns assigned correctly"] == 1.0
    assert found["delta error"] < 0.2


def test_groups_that_share_an_input_are_matched_as_one():
    evidence = basecase.record(basecase.Attention(), 0.05, inputs=torch.randn(24, 16, 64), steps=4, scheme="tempo")
    assert "query + key + value" in {evidence.truth.name(layer) for layer in evidence.view.layers}
    _, found = figures(evidence)
    assert found["rows and columns assigned correctly"] == 1.0
    assert found["delta error, median of products"] < 0.3


def test_kernel_taps_of_convolutions_are_features():
    evidence = basecase.record(convolutions(), 0.05, inputs=torch.randn(32, 16, 6, 6), scheme="tempo")
    assert {call.w.dim() for call in evidence.view.calls} == {2, 4}
    _, found = figures(evidence)
    assert found["rows and columns assigned correctly"] == 1.0
    assert found["delta error, median of products"] < 0.2


def test_half_of_the_output_features_suffice():
    evidence = basecase.record(basecase.network(), 0.05, scheme="tempo")
    call, candidates = basecase.newest(evidence.view, evidence.knowledge)[0]
    half = replace(call, stored=replace(call.stored, tensors={"w": call.w[: len(call.w) // 2]}))
    guess = undo(half, candidates)
    behind = evidence.truth.of(call)
    assert torch.equal(guess.rows, behind.permutation("P")[: len(guess.rows)])
    assert torch.equal(guess.columns, behind.permutation("A"))
    plain, public = behind["w"][guess.rows].double(), guess.base[guess.rows]
    assert basecase.delta_error(guess.w[guess.rows], plain, public) < 0.25


@pytest.mark.parametrize("rounds", [1, 2])
def test_mixing_leaves_no_signature(rounds):
    finding, found = figures(basecase.record(basecase.network(), 0.05, scheme="mix", mix_rounds=rounds))
    assert finding.verdict == "resisted"
    assert found["delta error"] > 5
    assert found["rows and columns assigned correctly"] < 0.15


def test_the_curve_varies_the_drift_under_the_masks_of_the_transcript():
    evidence = basecase.record(basecase.network(), 0.05, scheme="tempo")
    curve = figures(evidence)[0].curves[0]
    assert curve.x[0] == 0.0
    assert curve.series["delta error"][0] is None
    assert all(error < 0.2 for error in curve.series["delta error"][1:])
    assert all(share == 1.0 for share in curve.series["rows assigned correctly"])


def test_the_right_public_weight_is_chosen_among_several_of_one_shape():
    evidence = basecase.record(basecase.network(96, 64, 96), 0.05, scheme="tempo")
    base = {f"other{i}": torch.randn(64, 96) for i in range(5)} | dict(evidence.knowledge.base)
    for call, candidates in basecase.newest(evidence.view, Knowledge(base=base)):
        if len(call.w) == 64:
            assert undo(call, candidates).name == "0.weight"


def test_without_the_truth_nothing_is_claimed():
    evidence = basecase.record(basecase.network(), 0.05, scheme="tempo")
    assert Signatures().run(evidence.view, evidence.knowledge, None).verdict == "not scored"


def test_scales_are_fitted_through_zeros_and_a_wrong_line():
    generator = torch.Generator().manual_seed(0)
    public = torch.randn(20, 30, 2, generator=generator, dtype=torch.float64)
    rows, columns = torch.rand(20, generator=generator) + 0.1, torch.rand(30, generator=generator) + 0.1
    masked = public * (rows[:, None] * columns)[..., None]
    masked[3] = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    public[5, 6:12] = 0.0
    a, b = fit_scales(masked, public)
    right = torch.arange(20) != 3
    product = (a[:, None] * b)[right] / (rows[:, None] * columns)[right]
    assert float((product - 1).abs().max()) < 0.1

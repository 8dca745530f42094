"""Singular vectors: one rotated axis falls, and convolutions always; a matrix rotated on both sides holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempo.audit.attacks.singular_vectors import SingularVectors, polar, rotations
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import InputsMixed
from tempo.schemes.mix import Mix


def figures(evidence):
    finding = SingularVectors().run(evidence.view, evidence.knowledge, evidence.truth)
    return finding, {figure.name: figure.value for figure in finding.figures}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("drift", [0.01, 0.1])
def test_a_rotation_of_one_axis_is_undone(drift):
    evidence = basecase.record(basecase.network(48, 192, 48), drift, masks=InputsMixed(48))
    finding, found = figures(evidence)
    assert finding.verdict == "broken"
    assert found["rows assigned correctly"] == 1.0
    assert 0.25 < found["delta error"] < 0.45


def uncloaked(rounds: int) -> Mix:
    return Mix(rounds=rounds, cloak=0, insecure_small_blocks=True)


def test_permutations_and_scales_are_undone():
    _, found = figures(basecase.record(basecase.network(), 0.05, scheme="tempo"))
    assert found["rows and columns assigned correctly"] == 1.0
    assert found["delta error"] < 0.2


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_matrix_mixed_on_both_sides_gives_its_singular_values_away_and_no_more(rounds):
    finding, found = figures(basecase.record(basecase.network(), 0.05, masks=uncloaked(rounds)))
    assert finding.verdict == "resisted"
    assert found["delta error"] == pytest.approx(1.0, abs=0.03)
    assert "rows assigned correctly" not in found


def test_groups_mixed_on_both_sides_hold_and_permuted_ones_fall():
    for scheme, verdict in (("mix", "resisted"), ("tempo", "broken")):
        attention = basecase.record(basecase.Attention(), 0.05, inputs=torch.randn(24, 16, 64), steps=4, scheme=scheme)
        finding, found = figures(attention)
        assert finding.verdict == verdict
        if scheme == "mix":
            assert found["delta error"] > 0.95


def test_spatial_convolutions_fall_whatever_the_mixing_since_taps_share_their_masks():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.GELU(), nn.Conv2d(48, 32, 1))
    evidence = basecase.record(network, 0.05, inputs=torch.randn(64, 32, 4, 4), masks=uncloaked(rounds=2))
    finding, found = figures(evidence)
    assert finding.verdict == "broken"
    # (m² + d²)/2 of 9·m·d numbers look like rotations: the change's share in them stays unknown.
    assert found["delta error"] == pytest.approx(((48**2 + 32**2) / (2 * 9 * 48 * 32)) ** 0.5, abs=0.1)
    assert found["delta error, median of products"] > 0.95  # the 1×1 convolution is a matrix


@pytest.mark.parametrize("rank", [0, 16])
def test_both_masks_of_a_convolution_are_found_under_a_cloak(rank):
    public = gaussian(40, 36, 9)
    P, A = polar(gaussian(40, 40, seed=1)), polar(gaussian(36, 36, seed=2))
    change = 0.05 * gaussian(40, 36, 9, seed=3)
    # Singular values where a cloak hides best: those of the weight's own bulk, and below.
    sides = [torch.linalg.qr(gaussian(size, rank, seed=size)).Q for size in (40, 36 * 9)] if rank else []
    cloak = 8 * sides[0] @ sides[1].T if rank else torch.zeros(40, 36 * 9)
    masked = torch.einsum("ij,jbk,ab->iak", P, public + change + cloak.view_as(public), A)
    guessed_p, guessed_a, guessed_cloak = rotations(masked, public)
    assert float((guessed_p * P).sum() / 40) > 0.99
    assert float((guessed_a * A).sum() / 36) > 0.99
    w = torch.einsum("ji,jbk,ba->iak", guessed_p, masked - guessed_cloak, guessed_a)
    assert basecase.delta_error(w, public + change, public) < (0.8 if rank else 0.45)
    assert (guessed_cloak.norm() > 0) == (rank > 0)


def test_without_the_truth_nothing_is_claimed():
    evidence = basecase.record(basecase.network(), 0.05, scheme="tempo")
    assert SingularVectors().run(evidence.view, evidence.knowledge, None).verdict == "not scored"

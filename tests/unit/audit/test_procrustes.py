"""Procrustes: base and data give orthogonal masks of features away, not the private change; scales they do not."""

from __future__ import annotations

import pytest
import torch

from tempo.audit.attacks.procrustes import Procrustes, correlated, rotation
from tempo.audit.attacks.singular_vectors import polar
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import OneSided
from tempo.schemes.mix import Mix

UNCLOAKED = Mix(cloak=0, insecure_small_blocks=True)


def figures(evidence):
    finding = Procrustes().run(evidence.view, evidence.knowledge, evidence.truth)
    return finding, {figure.name: figure.value for figure in finding.figures}


@pytest.mark.parametrize("masks", [OneSided(16), UNCLOAKED, Mix(rounds=2, cloak=0, insecure_small_blocks=True)])
def test_a_mask_of_features_is_recovered_however_rows_are_mixed(masks):
    finding, found = figures(correlated(0.02, masks=masks))
    assert finding.verdict == "broken"
    assert found["row correlation of A"] > 0.9
    assert found["delta error"] > 0.9


def test_scales_do_not_cancel_in_second_moments():
    finding, found = figures(correlated(0.02, scheme="tempo"))
    assert finding.verdict == "resisted"
    assert found["row correlation of A"] < 0.3


def test_groups_and_convolutions_are_attacked_too():
    attention = basecase.record(basecase.Attention(), 0.02, inputs=torch.randn(256, 16, 64), steps=4, masks=UNCLOAKED)
    assert figures(attention)[1]["row correlation of A"] > 0.5
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(32, 48, 3, padding=1), torch.nn.GELU(), torch.nn.Conv2d(48, 32, 1))
    finding, found = figures(basecase.record(network, 0.02, inputs=torch.randn(128, 32, 4, 4), masks=UNCLOAKED))
    assert finding.verdict == "broken"
    assert found["row correlation of A"] > 0.5


def test_a_base_that_never_moved_still_tells_the_mask():
    finding, found = figures(correlated(0.0, masks=UNCLOAKED, lr=0.0))
    assert finding.verdict == "broken"
    assert set(found) == {"row correlation of A", "row correlation of A, median of products"}


def test_data_of_another_distribution_and_another_base_tell_nothing():
    evidence = correlated(0.02, scheme="mix")
    stranger = correlated(0.02, scheme="mix").knowledge
    other = {name: torch.randn_like(w) for name, w in stranger.base.items()}
    finding = Procrustes().run(
        evidence.view, type(stranger)(stranger.architecture, other, stranger.data), evidence.truth
    )
    assert finding.verdict == "resisted"


def test_what_is_not_known_makes_it_not_applicable():
    evidence = correlated(0.02, scheme="mix")
    knowledge = evidence.knowledge
    finding = Procrustes().run(evidence.view, type(knowledge)(base=knowledge.base), evidence.truth)
    assert finding.verdict == "not applicable"


def test_without_the_truth_nothing_is_claimed():
    evidence = correlated(0.02, rows=256, scheme="mix")
    assert Procrustes().run(evidence.view, evidence.knowledge, None).verdict == "not scored"


def test_one_rotation_of_two_moments_is_found_exactly():
    generator = torch.Generator().manual_seed(0)
    sides = torch.randn(2, 60, 30, generator=generator, dtype=torch.float64)
    public = [side.T @ side for side in sides]
    A = polar(torch.randn(30, 30, generator=generator, dtype=torch.float64))
    found = rotation([A @ moment @ A.T for moment in public], public)
    assert float((found * A).sum().abs() / 30) > 0.999

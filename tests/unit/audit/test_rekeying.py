"""The same weight under old and under new masks."""

from __future__ import annotations

import pytest
import torch

from tempo.audit.attacks.rekeying import Rekeying, resident
from tempo.audit.controls.weak import small_mix
from tempo.audit.knowledge import Knowledge
from tempo.audit.lab import Lab
from tempo.optim import Muon


def attack(recorded: Lab):
    finding = Rekeying().run(recorded.views[0], Knowledge(), recorded.truth())
    return finding, {figure.name: figure.value for figure in finding.figures}


def test_without_a_cloak_masks_are_linked_exactly_whatever_their_rounds():
    _, figures = attack(resident(masks=small_mix(32, rounds=2)))
    assert figures["masks linked"] > 0.99
    assert figures["masks of outputs linked"] > 0.99
    assert figures["misfit"] < 0.01


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_magnitudes_link_signed_permutations(optimizer):
    build = {
        "sgd": lambda w: torch.optim.SGD(w, 0.05, momentum=0.9),
        "adam": lambda w: torch.optim.Adam(w, 1e-3, amsgrad=True),
    }[optimizer]
    _, figures = attack(resident(build, scheme="tempo-signed"))
    assert figures["masks linked"] == pytest.approx(1.0)
    assert figures["masks of outputs linked"] == pytest.approx(1.0)
    assert figures["misfit"] < 1e-6


def test_a_momentum_without_a_cloak_links_masks_that_one_with_a_cloak_links_less():
    cloaked = attack(resident(scheme="mix", spectrum=1.0))[1]
    uncloaked = attack(resident(lambda w: Muon(w, 1e-3), scheme="mix", spectrum=1.0))[1]
    assert uncloaked["masks linked"] > cloaked["masks linked"] + 0.1


def test_one_pair_of_masks_gives_nothing_to_link():
    assert attack(resident(steps=2, scheme="mix"))[0].verdict == "not applicable"

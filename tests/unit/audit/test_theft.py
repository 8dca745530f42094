"""Scores of stolen models lie between their two floors."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from tempo.audit import theft
from tempo.audit.attack import NotApplicable
from tempo.audit.controls import victims
from tempo.audit.truth import Truth


@pytest.fixture(scope="module")
def recorded():
    return victims.relu_mlp().record("insecure-plain")


def scores(recorded, stolen):
    found = theft.figures(stolen, recorded.truth, recorded.knowledge.architecture, recorded.knowledge.data)
    assert found[0].name == "fidelity"
    return {figure.name: figure for figure in found}


def test_the_victim_itself_reaches_every_ceiling(recorded):
    found = scores(recorded, deepcopy(recorded.truth.victim))
    assert all(figure.value == figure.ceiling for figure in found.values())
    assert found["fidelity"].value == 1
    assert found["fidelity"].leaking


def test_the_black_box_is_what_counts_as_chance(recorded):
    box = theft.surrogate(recorded.truth.victim, recorded.knowledge.architecture, recorded.knowledge.data)
    found = scores(recorded, box)
    assert all(figure.value == figure.chance for figure in found.values())
    assert not found["fidelity"].leaking
    assert 0.7 < found["fidelity"].value < 1


def test_a_random_network_is_no_theft(recorded):
    torch.manual_seed(1)
    found = scores(recorded, recorded.knowledge.architecture())
    assert found["fidelity"].value < 0.5
    assert not found["fidelity"].leaking
    assert found["adversarial transfer"].value < found["adversarial transfer"].ceiling


def test_scoring_leaves_the_victim_as_it_was(recorded):
    before = {name: tensor.clone() for name, tensor in recorded.truth.victim.state_dict().items()}
    scores(recorded, recorded.knowledge.architecture())
    assert all(torch.equal(tensor, before[name]) for name, tensor in recorded.truth.victim.state_dict().items())


def test_without_a_victim_nothing_is_scored(recorded):
    with pytest.raises(NotApplicable, match="--truth"):
        theft.figures(recorded.truth.victim, Truth({}), recorded.knowledge.architecture, recorded.knowledge.data)

"""A stolen network runs as the victim does under `tempo`, and comes to nothing under `mix`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tempo.audit import lab, theft
from tempo.audit.attacks.model_theft import ModelTheft
from tempo.audit.controls import victims
from tempo.audit.controls.victims import Victim
from tempo.audit.knowledge import Knowledge
from tempo.audit.samples import Samples
from tempo.audit.solvers.ends import align_outputs
from tempo.audit.solvers.placed import Placed


def stolen(victim, scheme="tempo"):
    """What the attack makes of ``victim``, its share of the victim's answers, and the record."""
    recorded = victim.record(scheme)
    attack = ModelTheft()
    found = attack.recover(recorded.views[0], recorded.knowledge.only(attack.knows), "quick")
    test = recorded.truth.test.inputs
    same = theft.predictions(found.model, test) == theft.predictions(recorded.truth.victim, test)
    return found, float(same.double().mean()), recorded


def test_a_residual_network_with_batch_norm_is_stolen():
    found, fidelity, recorded = stolen(victims.resnet())
    assert not found.failed
    assert found.assembly.agreement(recorded.truth) > 0.99
    assert max(placed.residual for placed in found.assembly.placed.values()) < 0.01
    assert fidelity > 0.95


def test_a_gelu_network_is_stolen():
    def build():
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)
        )

    found, fidelity, recorded = stolen(Victim(build, batch=256))
    assert found.assembly.agreement(recorded.truth) > 0.95
    assert fidelity > 0.95


def test_a_trusted_last_layer_is_fitted_to_the_attackers_samples():
    found, fidelity, recorded = stolen(replace(victims.relu_mlp(), trusted=("7",)))
    assert "7" not in found.assembly.placed
    assert found.assembly.agreement(recorded.truth) > 0.99
    assert fidelity > 0.9


def test_trusted_first_and_last_layers_leave_less_than_a_black_box_does():
    found, fidelity, recorded = stolen(replace(victims.relu_mlp(), trusted=("1", "7")))
    assert found.assembly.agreement(recorded.truth) > 0.99
    box = theft.surrogate(recorded.truth.victim, recorded.knowledge.architecture, recorded.knowledge.data)
    test = recorded.truth.test.inputs
    same = theft.predictions(box, test) == theft.predictions(recorded.truth.victim, test)
    assert 0.5 < fidelity <= float(same.double().mean()) + 0.03


def test_mixing_leaves_nothing_that_runs():
    recorded = victims.relu_mlp().record("mix")
    finding = ModelTheft().run(recorded.views[0], recorded.knowledge, recorded.truth)
    assert finding.verdict == "resisted"
    figures = {figure.name: figure for figure in finding.figures}
    assert figures["fidelity"].value < figures["fidelity"].chance
    assert figures["channels chained"].value < 0.02
    assert figures["products placed"].value < 1


def test_functions_that_mix_channels_are_named():
    def build():
        return nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 10))

    with lab.open_lab(scheme="tempo") as opened:
        model = build()
        opened.session.protect(model, base="secret")
        model(torch.randn(32, 32)).sum().backward()
        view = opened.views[0]
    knowledge = Knowledge(build, None, Samples(torch.randn(32, 32), torch.zeros(32).long()))
    finding = ModelTheft().run(view, knowledge, None)
    assert finding.verdict == "not applicable"
    assert "mix channels" in finding.reason


def test_another_architecture_does_not_fit():
    recorded = victims.relu_mlp().record("tempo")
    wrong = Knowledge(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), None, recorded.knowledge.data)
    finding = ModelTheft().run(recorded.views[0], wrong, recorded.truth)
    assert finding.verdict == "not applicable"
    assert "architecture" in finding.reason


@pytest.mark.parametrize("loss", ["cross entropy", "square"])
def test_the_gradient_of_cross_entropy_gives_scales_and_bias(loss):
    generator = torch.Generator().manual_seed(0)
    y, bias = torch.randn(64, 10, generator=generator).double(), torch.randn(10, generator=generator).double()
    labels = torch.randint(10, (64,), generator=generator)
    v, p = (torch.rand(size, generator=generator).double() + 0.1 for size in (64, 10))
    one_hot = nn.functional.one_hot(labels, 10).double()
    g = (y + bias).softmax(1) - one_hot if loss == "cross entropy" else y + bias - one_hot
    call = type("Masked", (), {"y": y * v[:, None] * p, "g": g / (v[:, None] * p)})
    zeros = torch.zeros(10).double()
    placed = Placed(call, torch.arange(64), torch.arange(10), v.log(), zeros, torch.arange(10), zeros.clone())
    module = nn.Linear(4, 10).double()
    told = align_outputs(placed, module)
    assert told == (loss == "cross entropy")
    if told:
        assert torch.allclose((placed.y() + module.bias).softmax(1), (y + bias).softmax(1), atol=1e-6)

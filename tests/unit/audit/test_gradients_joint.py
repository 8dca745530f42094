"""Weights, gradients and inputs of successive steps, used together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempo.audit import lab
from tempo.audit.attacks.gradients_joint import GradientsJoint, descend
from tempo.audit.controls.weak import Uncovered
from tempo.audit.knowledge import Knowledge
from tempo.audit.transcript import View


def attack(recorded, view: View | None = None):
    finding = GradientsJoint().run(view or recorded.views[0], Knowledge(), recorded.truth())
    return finding, {figure.name: figure.value for figure in finding.figures}


@pytest.mark.parametrize("masks", [Uncovered(rounds=2), Uncovered(64, 64)])
def test_no_mixing_of_weights_alone_keeps_gradient_descent_from_linking_masks(masks):
    _, figures = attack(descend(masks))
    assert figures["masks linked"] > 0.9
    assert figures["masks of outputs linked"] > 0.9
    assert figures["misfit"] < 0.01


def test_adam_is_not_followed_exactly():
    figures = attack(descend(Uncovered(), "adam"))[1]
    assert figures["misfit"] > 0.3


def test_a_dense_change_of_the_weights_in_every_step_stops_it():
    recorded = descend(Uncovered())
    view = recorded.views[0]
    generator = torch.Generator().manual_seed(1)
    for call in view.calls:
        w = call.w
        noise = torch.randn(w.shape, generator=generator)
        call.stored = replaced(call.stored, w=w + noise * (w.norm() / noise.norm()))
    finding, figures = attack(recorded, view)
    assert finding.verdict == "resisted"
    assert figures["masks linked"] < 0.3


def replaced(record, **tensors):
    fields = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return type(record)(**(fields | {"tensors": {**record.tensors, **tensors}}))


def test_one_step_gives_nothing_to_link():
    assert attack(descend(Uncovered(), steps=1))[0].verdict == "not applicable"


def test_accumulated_gradients_are_added_up():
    torch.manual_seed(1)
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mixing = torch.randn(64, 64)
    with lab.open_lab(masks=Uncovered()) as opened:
        opened.session.protect(model, base="secret")
        for _ in range(2):
            for _ in range(3):
                model(torch.randn(512, 64) @ mixing).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        opened.session.unprotect(model)
    figures = attack(opened)[1]
    assert figures["misfit"] < 0.01
    assert figures["masks linked"] > 0.9

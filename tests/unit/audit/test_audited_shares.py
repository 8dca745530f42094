"""Transcripts of scheme `split`: read as products of numbers, attacked by one worker, by none, and by all together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tempo.audit import lab
from tempo.audit.adapters import adapted, change
from tempo.audit.attacks.gram import Gram
from tempo.audit.attacks.information import Information
from tempo.audit.knowledge import Knowledge
from tempo.audit.report.contents import read
from tempo.audit.report.levels import progress
from tempo.audit.shares import simulated, together
from tempo.settings import Settings
from tempo.wire.integers import integers

REPORT = Path(__file__).parents[3] / "benchmarks" / "audit" / "report.json"


@pytest.fixture(scope="module")
def recorded() -> lab.Lab:
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)))
    assert change(model) == 0
    batches = [(torch.randn(40, 24) @ torch.randn(24, 24), torch.randint(16, (40,))) for _ in range(3)]
    found = lab.train(
        model, batches, lambda net, x, y: nn.functional.cross_entropy(net(x), y),
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5),
        base="public", scheme="split", workers=2, operators=2, verify="always",
    )  # fmt: skip
    assert change(model) > 0
    return found


def test_every_call_is_read_with_its_step_its_weight_and_its_gradient(recorded):
    truth = recorded.truth()
    assert len(recorded.views) == 2
    for view in recorded.views:
        assert view.steps == [0, 1, 2]
        for call in view.calls:
            behind = truth.of(call)
            assert torch.equal(call.w, integers(behind["w"], Settings().split_weight_bits)[0].float())
            assert call.x.shape == behind["x"].shape
            first = call.w.shape[1] == 24  # nothing before it wants a gradient
            assert (call.g is None) == first
            if not first:
                assert call.g.shape == behind["g"].shape


def test_both_together_have_the_rows_and_the_gradients(recorded):
    truth = recorded.truth()
    for call in together(recorded.views).calls:
        behind = truth.of(call)
        for found, plain in ((call.x, behind["x"]), (call.y, behind["x"] @ call.w.t())):
            similarity = torch.cosine_similarity(found.double(), plain.double(), 1)
            assert float(similarity[plain.norm(dim=1) > 0].min()) > 0.999


def test_attacks_are_at_the_simulator_s_floor_and_break_both_together(recorded):
    truth = recorded.truth()
    for attack, floor, broken in ((Gram(), 0.15, 0.5), (Information(), 0.05, 0.3)):
        for view in (*recorded.views, simulated(recorded.views[0])):
            assert attack.run(view, Knowledge(), truth).figures[0].value < floor
        assert attack.run(together(recorded.views), Knowledge(), truth).figures[0].value > broken


def test_the_report_has_operators_at_the_simulator_s_floor_and_both_together_broken():
    runs = {run.attacker: run for run in read(REPORT).runs if run.scheme == "split"}
    scored = {who: [f for f in run.findings if f.figures] for who, run in runs.items()}
    floor = {f.attack: progress(f.figures[0]) for f in scored["a simulator"]}
    operators = {f.worker for f in scored["each operator"]}
    assert len(operators) == 2
    for run in runs.values():
        assert run.facts == ["architecture", "base", "data"]
        assert run.offloaded > 0.85  # or there would have been little to find
    for operator in operators:
        own = {f.attack: f for f in scored["each operator"] if f.worker == operator}
        assert own.keys() == floor.keys()  # every attack that applies was tried on each
        for attack, finding in own.items():
            assert finding.verdict == "resisted"
            assert progress(finding.figures[0]) < floor[attack] + 0.05
    broken = {f.attack for f in scored["all operators together"] if f.verdict == "broken"}
    assert broken == {"gram", "cross-layer", "zero-rows", "reconstruction-base", "procrustes", "information"}

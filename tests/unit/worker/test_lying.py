"""Lies for tests: about answers or about updates, never both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from tempo.engine.link import ACKNOWLEDGED, Link
from tempo.errors import SettingsError
from tempo.wire.messages import Backward, Fetch, Forward, Linear, Muon, Rule, Sgd, Store, Update
from tempo.worker.lying import LIES, UPDATE_LIES
from tempo.worker.update import apply

from .conftest import InProcess

Start = Callable[..., InProcess]
WHERE: dict[str, Any] = {"step": 0, "layer": 0, "weight": 1}
SGD = Sgd(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.1, nesterov=False, maximize=False)
MUON = Muon(0.1, 0.2, 0.1, 0.9, nesterov=True, coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, iterations=5)
T, M, D = 6, 5, 4


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, W, G = random(T, D, seed=0), random(M, D, seed=1), random(T, M, seed=2)


def fetch(link: Link, name: str) -> Tensor:
    wants = {name: ((1,) if name == "norm" else (M, D), torch.float64)}
    return link.request(Fetch(**WHERE), {}, wants)[name].result().clone()


def answers(link: Link) -> dict[str, Tensor]:
    """One of each kind, in order."""
    link.request(Store(**WHERE), {"w": W}, {})[ACKNOWLEDGED].result()
    forward = Forward(**WHERE, operand=1, product=Linear())
    y = link.request(forward, {"x": X}, {"y": ((T, M), torch.float64)})["y"].result().clone()
    backward = Backward(**WHERE, operand=1, product=Linear(), accumulate=True)
    dx = link.request(backward, {"g": G}, {"dx": ((T, D), torch.float64)})["dx"].result().clone()
    return {"y": y, "dx": dx, "w": fetch(link, "w"), "gradient": fetch(link, "gradient"), "norm": fetch(link, "norm")}


HONEST = {"y": X @ W.t(), "dx": G @ W, "w": W, "gradient": G.t() @ X, "norm": (G.t() @ X).norm()[None]}


def false(found: dict[str, Tensor]) -> set[str]:
    return {name for name, answer in found.items() if not torch.allclose(answer, HONEST[name], rtol=1e-12)}


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_answers_are_about_all_of_them(start: Start, lie: str) -> None:
    expected = set(HONEST) - {"swap": {"norm"}, "stale": {"y", "dx", "w", "norm"}}.get(lie, set())
    assert false(answers(start(insecure_lie=lie).link())) == expected


@pytest.mark.parametrize(("which", "name"), list(enumerate(HONEST, 1)))
def test_a_lie_is_told_every_so_many_times(start: Start, which: int, name: str) -> None:
    assert false(answers(start(insecure_lie=f"element:{which}").link())) >= {name}
    assert false(answers(start(insecure_lie="element:6").link())) == set()


def updated(start: Start, lie: str, rule: Rule = SGD) -> Tensor:
    """What is really there after one update, as a second honest look tells."""
    worker = start(insecure_lie=lie) if lie else start()
    link = worker.link()
    link.request(Store(**WHERE), {"w": W, "gradient": G.t() @ X}, {})[ACKNOWLEDGED].result()
    link.request(Update(**WHERE, rule=rule, scale=0.5), {}, {})[ACKNOWLEDGED].result()
    y = link.request(
        Forward(**WHERE, operand=0, product=Linear()),
        {"x": torch.eye(D, dtype=torch.float64)},
        {"y": ((D, M), torch.float64)},
    )
    return y["y"].result().t().clone()


@pytest.mark.parametrize("lie", UPDATE_LIES)
def test_lies_about_updates_leave_answers_alone(start: Start, lie: str) -> None:
    assert false(answers(start(insecure_lie=lie).link())) == set()


@pytest.mark.parametrize("lie", [f"{lie}:2" for lie in [*LIES, *UPDATE_LIES]])
def test_lies_about_answers_and_those_not_yet_due_leave_updates_alone(start: Start, lie: str) -> None:
    assert torch.allclose(updated(start, lie), updated(start, ""), rtol=1e-12)


@pytest.mark.parametrize(
    ("rule", "faster"),
    [(SGD, replace(SGD, lr=1.0)), (MUON, replace(MUON, lr=1.0, adjusted_lr=2.0))],
    ids=["sgd", "muon"],
)
def test_lies_about_updates(start: Start, rule: Rule, faster: Rule) -> None:
    honest = updated(start, "", rule)
    assert torch.equal(updated(start, "not-updated", rule), W)
    w = W.clone()
    apply(faster, w, 0.5 * G.t() @ X, {})
    torch.testing.assert_close(updated(start, "other-rate", rule), w, rtol=1e-12, atol=1e-12)
    forged = (updated(start, "forged-update", rule) - honest).norm() / (honest - W).norm()
    assert 0.02 < forged < 0.1


def test_an_update_that_was_not_made_still_drops_the_gradient(start: Start) -> None:
    link = start(insecure_lie="not-updated").link()
    answers(link)
    link.request(Update(**WHERE, rule=SGD), {}, {})[ACKNOWLEDGED].result()
    answer = link.request(Update(**WHERE, rule=SGD), {}, {})[ACKNOWLEDGED]
    assert "unknown-number" in str(answer.exception())


def test_an_unknown_lie_is_refused_with_the_nearest(start: Start) -> None:
    with pytest.raises(SettingsError, match="forged-update"):
        start(insecure_lie="forged-updat")

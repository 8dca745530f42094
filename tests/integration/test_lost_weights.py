"""Weights on workers that lie about them or vanish: noticed at once, named, and made good from a checkpoint."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_lying_workers import session_with
from test_weights_on_workers import Attention, loss_of
from torch import nn

import tempo
from tempo.engine.away import AwayParameter
from tempo.errors import WeightsLostError, WorkerError, WorkerLiedError, WorkerLostError
from tempo.recipes import recipe as recipes
from tempo.recipes import train as training
from tempo.recipes.comparison import losses
from tempo.session import Session
from tempo.worker.lying import LIES, UPDATE_LIES

STEPS = 6


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.2, momentum=0.9, weight_decay=0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, number)
    loss.backward()
    optimizer.step()
    return loss.item()


def plain_losses() -> list[float]:
    model = Attention()
    optimizer = optimizer_of(model)
    return [step(model, optimizer, number) for number in range(STEPS)]


def resilient(session: Session, every: int = 2) -> tuple[list[float], list[tuple[int, WorkerError]]]:
    """A loop with checkpoints; its losses, and what went wrong at which step."""
    crew = session._engine.crew
    crew.shares[:] = [1.0] * len(crew.shares)  # whoever was measured slow on a busy machine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = session.protect(Attention())
    optimizer = session.optimizer(optimizer_of(model))
    saved: tuple[int, Any] = (0, None)
    found: list[float] = []
    failures: list[tuple[int, WorkerError]] = []
    while len(found) < STEPS:
        try:
            if len(found) % every == 0 and saved[0] <= len(found):
                saved = len(found), copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            found.append(step(model, optimizer, len(found)))
        except WeightsLostError as error:
            failures.append((len(found), error))
            session.abandon_lost_weights()
            model.load_state_dict(saved[1][0])
            optimizer.load_state_dict(copy.deepcopy(saved[1][1]))
            del found[saved[0] :]
    assert session.stats().decryptions["w"] > 0, "no weight ever lived on a worker"
    return found, failures


@pytest.mark.parametrize("scheme", ["mix", "tempo-signed"])
@pytest.mark.parametrize("lie", [*LIES, *UPDATE_LIES])
def test_every_lie_is_caught_and_the_run_ends_with_plain_pytorch_s_numbers(
    lie: str, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Not with its first answer, so that there is something to lose.
    told = lie if lie in UPDATE_LIES else f"{lie}:5"
    with session_with("", told, "", scheme=scheme, update="worker") as session, caplog.at_level(logging.ERROR, "tempo"):
        found, failures = resilient(session)
        incidents = session.incidents
    assert found == pytest.approx(plain_losses(), rel=1e-4, abs=1e-6)
    assert [type(incident.error) for incident in incidents] == [WorkerLiedError]
    assert incidents[0].address == "worker1:0@operator1"
    assert "times its tolerance" in caplog.text
    if lie in UPDATE_LIES:
        ((when, error),) = failures
        assert when == 1, "a wrong update was not noticed by the very next product"
        for said in ("lived on worker worker1", "1 updates since", "load the last checkpoint"):
            assert said in str(error)


def test_honest_workers_are_never_accused() -> None:
    with session_with("", "", scheme="mix", update="worker") as session:
        found, failures = resilient(session, every=100)
        assert (failures, session.incidents) == ([], [])
    assert found == pytest.approx(plain_losses(), rel=1e-4, abs=1e-6)


def test_a_false_norm_is_refused_where_sketches_rule_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with session_with("", scheme="mix", update="worker") as session:
        model = session.protect(nn.Linear(64, 64))
        optimizer = session.optimizer(optimizer_of(model))
        model(torch.randn(48, 64)).square().mean().backward()
        (residence,) = session._engine.residences
        honest, fetch = residence.norm(), residence._fetch
        for factor in (1e-2, 1e4):
            monkeypatch.setattr(residence, "_fetch", lambda wants, f=factor: {"norm": f * fetch(wants)["norm"]})
            with pytest.raises(WorkerLiedError, match="which sketches rule out"):
                session.clip_grad_norm_(model.parameters(), 1.0)
        monkeypatch.setattr(residence, "_fetch", fetch)
        assert residence.norm() == honest
        optimizer.step()


def test_fetched_weights_are_checked_before_they_are_used() -> None:
    with session_with("element:6", scheme="mix", update="worker") as session:
        model = session.protect(nn.Linear(64, 64))
        optimizer = session.optimizer(optimizer_of(model))
        model(torch.randn(48, 64)).square().mean().backward()
        optimizer.step()
        honest = session._engine.links[0]
        assert isinstance(model.weight, AwayParameter)
        # The worker's numbers change under its hands, as by faulty memory.
        (residence,) = session._engine.residences
        residence.sketch._w += 1.0
        with pytest.raises(WeightsLostError, match="wrong weight"):
            model.state_dict()
        assert honest._lost is not None


@pytest.mark.parametrize("number", [4, 13, 22])
def test_a_worker_killed_at_any_request_loses_no_more_than_what_a_checkpoint_has(number: int) -> None:
    with tempo.connect(
        scheme="mix",
        base="secret",
        placement="all",
        divide_flops=1,
        update="worker",
        local_workers=2,
        local_threads=1,
        patience=0,
    ) as session:
        link = session._engine.links[1]
        request, count = link.request, [0]

        def fatal(*arguments: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                link.process.kill()
                link.process.wait()
            return request(*arguments)

        link.request = fatal
        found, failures = resilient(session)
        (incident,) = session.incidents
    assert isinstance(incident.error, WorkerLostError)
    assert len(failures) <= 1
    assert found == pytest.approx(plain_losses(), rel=1e-4, abs=1e-6)


def test_what_was_not_changed_since_it_was_stored_is_not_lost() -> None:
    with tempo.connect(
        scheme="mix", base="secret", placement="all", update="worker", local_workers=2, patience=0
    ) as session:
        model = session.protect(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)))
        before = copy.deepcopy(model.state_dict())
        optimizer = session.optimizer(optimizer_of(model))
        model(torch.randn(48, 64))
        assert any(isinstance(p, AwayParameter) for p in model.parameters())
        for link in session._engine.links[1:]:
            link.process.kill()
            link.process.wait()
        model(torch.randn(48, 64)).sum()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        assert optimizer.state_dict()["state"] == {}


def job(folder: Path, **session: Any) -> recipes.Recipe:
    values: dict[str, Any] = {
        "model": {"name": "vit-small", "width": 32, "depth": 1, "heads": 2, "mlp": 48},
        "data": {"source": "digits", "train_limit": 70, "test_limit": 20, "batch_size": 16},
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "run": {"steps": 12, "checkpoint_every": 4, "out": str(folder), "clip_norm": 1.0},
        "session": {"placement": "all", "scheme": "mix", "base": "public", "divide_flops": 1, "patience": 0} | session,
    }
    return recipes.parse(values, "test")


@pytest.mark.parametrize("scheme", ["tempo-signed", "insecure-plain"])
def test_a_job_goes_back_to_its_last_checkpoint_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    console = Console(file=(tmp_path / "said").open("w"), width=300)
    training.train(job(tmp_path / "plain"), console, plain=True)
    one_step, killed = training.one_step, []

    def disturbed(state: Any, began: float) -> Any:
        if state.step == 6 and not killed:
            link = state.session._engine.links[1]
            link.process.kill()
            link.process.wait()
            killed.append(link)
        return one_step(state, began)

    monkeypatch.setattr(training, "one_step", disturbed)
    outcome = training.train(job(tmp_path / "away", scheme=scheme, update="worker", local_workers=2), console)
    assert killed
    assert outcome.step == 12
    assert losses(tmp_path / "away") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4, abs=1e-6)
    console.file.close()
    assert "going back to step 4" in (tmp_path / "said").read_text()


def test_an_interrupted_job_resumes_what_optimizers_kept_on_workers(tmp_path: Path) -> None:
    console = Console(file=(tmp_path / "said").open("w"))
    training.train(job(tmp_path / "plain"), console, plain=True)
    away = {"scheme": "tempo-signed", "update": "worker"}
    first = job(tmp_path / "away", **away)
    one_step = training.one_step

    def interrupted(state: Any, began: float) -> Any:
        if state.step == 5:
            raise KeyboardInterrupt
        return one_step(state, began)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "one_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.train(first, console)
    training.train(job(tmp_path / "away", **away), console, resume=True)
    console.file.close()
    assert losses(tmp_path / "away") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4, abs=1e-6)

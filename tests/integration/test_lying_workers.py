"""A worker that lies is caught at once, and costs nothing: its answer is not used, others do its work."""

from __future__ import annotations

import logging

import pytest
import small_job
import torch
from adopted import session_with
from small_job import network
from torch import nn

from tempo import kernels
from tempo.engine.reply import Received
from tempo.errors import ProtectionWarning, WorkerLiedError, WorkerRefusedError
from tempo.worker.lying import LIES


def losses(model: nn.Module, steps: int = 3) -> list[float]:
    return small_job.losses(model, steps)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("scheme", ["tempo", "mix"])
def test_every_lie_is_caught_in_its_step_and_the_numbers_are_plain_pytorch_s(lie, scheme, caplog):
    small = {"insecure_small_blocks": True, "mix_block": 4, "mix_row_block": 4} if scheme == "mix" else {}
    with session_with("", lie, "", scheme=scheme, **small) as session, caplog.at_level(logging.ERROR, "tempo"):
        model = session.protect(network())
        assert losses(model) == pytest.approx(losses(network()), rel=1e-4, abs=1e-6)
        (incident,) = session.incidents
        assert session.stats().flops_offloaded > 0
    assert isinstance(incident.error, WorkerLiedError)
    assert incident.address == "worker1:0@operator1"
    assert incident.step <= 1  # "stale" has nothing to replay before
    for said in ("layer '", "worker1", "times its tolerance", "going on without it and its operator"):
        assert said in caplog.text, said


@pytest.mark.parametrize("which", range(1, 18, 3))
def test_a_lie_told_once_is_caught_wherever_it_is_told(which):
    """In any answer of three steps: outputs, gradients of inputs and of weights, of every layer."""
    with session_with("", f"element:{which}") as session:
        assert losses(session.protect(network())) == pytest.approx(losses(network()), rel=1e-4, abs=1e-6)
        assert len(session.incidents) == 1


def test_a_lie_is_caught_in_a_gradient_asked_for_again_where_the_weight_is_frozen():
    """That call sends its input for the gradient's sake alone, and nothing of it is kept."""
    layer = nn.Linear(8, 8).requires_grad_(False)
    x, g = torch.randn(12, 8, requires_grad=True), torch.randn(12, 8)
    expected = g @ layer.weight
    with session_with("element:3", "") as session:
        y = session.protect(layer)(x)
        for asked in range(2):
            (dx,) = torch.autograd.grad(y, x, g, retain_graph=True)
            torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-5)
            assert len(session.incidents) == asked


def test_honest_workers_are_never_accused():
    with session_with("", "", "") as session:
        losses(session.protect(network()), 20)
        assert session.incidents == []
        assert session.stats().seconds["verify"] > 0


def test_a_liar_s_operator_goes_with_it_and_masks_are_renewed():
    operators = ("honest", "shady", "shady")
    with session_with("", "row:4", "", operators=operators) as session:
        model = session.protect(network())
        with torch.no_grad():
            model(torch.randn(12, 3, 6, 6))
            before = session.stats()
            for _ in range(3):
                model(torch.randn(12, 3, 6, 6))
        used = session.stats() - before
        assert len(session.incidents) == 1
        assert session._engine.crew.present == [0]
        assert used.encryptions["w"] >= 3  # unchanged weights, but the liar held them under these masks


def test_an_operator_that_lied_is_not_let_in_again(workers):
    with session_with("", "zeros", operators=("honest", "shady")) as session:
        losses(session.protect(network()))
        assert session._engine.crew.banned == {"shady"}
        with pytest.raises(WorkerRefusedError, match="banned, for it lied"):
            session.add_worker(f"{workers[0]}@shady")
        session.add_worker(f"{workers[1]}@another")
        assert session._engine.crew.present == [0, 2]


def test_two_liars_in_concert_are_both_caught():
    with session_with("row:2", "", "row:3") as session:
        assert losses(session.protect(network())) == pytest.approx(losses(network()), rel=1e-4, abs=1e-6)
        assert len(session.incidents) == 2
        assert session._engine.crew.present == [1]


def test_with_nobody_else_left_a_lie_is_an_error_and_the_worker_stays_banned():
    with session_with("zeros") as session:
        model = session.protect(network())
        with pytest.raises(WorkerLiedError, match=r"layer '0': worker.*worker0.*wrong output.*step 0"):
            losses(model)
        with pytest.raises(WorkerLiedError, match="no worker is left"):
            losses(model)
        session.unprotect(model)
        assert losses(model) == losses(network())


def test_a_sample_is_not_protection_and_says_so():
    with session_with("element", verify="sample:0") as session:
        with pytest.warns(ProtectionWarning, match="finds faults, not liars"):
            model = session.protect(network())
        losses(model)
        assert session.incidents == []
    with session_with("element", "", verify="sample:0.5") as session:
        losses(session.protect(network()), 12)
        assert len(session.incidents) == 1
    with session_with("", verify="off") as session, pytest.warns(ProtectionWarning, match="used as they are"):
        session.protect(network())


def test_nothing_derived_from_a_wrong_answer_is_sent():
    """After the first wrong answer of the only worker, no further request leaves."""
    with session_with("infinity") as session:
        model = session.protect(network())
        with pytest.raises(WorkerLiedError):
            model(torch.randn(12, 3, 6, 6))
        link = session._engine.links[0]
        assert session.stats().encryptions["x"] == 1
        assert link._lost is not None


@pytest.mark.parametrize("instructions", kernels.available())
def test_what_is_used_is_what_was_checked(instructions, monkeypatch):
    """Right when it is read, wrong right after: a worker can write to shared memory at any time."""
    shared = []

    class Shared(Received):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            shared.extend(argument for argument in arguments if isinstance(argument, torch.Tensor))

    monkeypatch.setattr("tempo.engine.batch.Received", Shared)
    with kernels.using(instructions), session_with("") as session:
        model, plain = session.protect(nn.Linear(16, 8)), nn.Linear(16, 8)
        plain.load_state_dict(model.state_dict())
        judge = session._engine.verifier.judge

        def judged(*arguments):
            shared[-1].zero_()  # the worker, at the worst moment
            judge(*arguments)

        monkeypatch.setattr(session._engine.verifier, "judge", judged)
        x, again = torch.randn(20, 16, requires_grad=True), torch.randn(20, 8)
        expected = torch.autograd.grad(plain(x), [x, *plain.parameters()], again)
        found = torch.autograd.grad(model(x), [x, *model.parameters()], again)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert len(shared) == 3

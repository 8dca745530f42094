"""Workers that vanish in the middle of a step cost nothing: others finish it, with the same numbers."""

from __future__ import annotations

import copy
import logging
import signal
import time
from functools import partial

import pytest
import small_job
import torch
from small_job import network
from torch import nn

import tempo
from tempo.errors import ProtectionWarning, WorkerLostError
from tempo.session import Session

STEPS = 2

losses = partial(small_job.losses, steps=STEPS)


def requests_of(session: Session, worker: int) -> int:
    """How many requests a worker gets in an undisturbed run."""
    link, count = session._engine.links[worker], [0]
    request = link.request

    def counted(*arguments):
        count[0] += 1
        return request(*arguments)

    link.request = counted
    losses(session.protect(network()))
    return count[0]


def kill_at(session: Session, worker: int, number: int, *, after: bool) -> None:
    """Kill the worker's process just before or just after its request of that number is sent."""
    link, count = session._engine.links[worker], [0]
    request = link.request

    def fatal(*arguments):
        count[0] += 1
        futures = request(*arguments) if after or count[0] != number else None
        if count[0] == number:
            link.process.kill()
            link.process.wait()
        return futures or request(*arguments)

    link.request = fatal


def open_session(workers: int = 2, **fields) -> Session:
    fields = {"scheme": "tempo", "base": "secret", "patience": 0} | fields
    return tempo.connect(placement="all", divide_flops=1, local_workers=workers, local_threads=1, **fields)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_worker_killed_at_any_request_of_a_step_costs_nothing(after, caplog):
    expected = losses(network())
    with open_session() as session:
        count = requests_of(session, 1)
    assert count >= 3 * 2 * STEPS  # every layer forward and backward, and weights
    for number in range(1 + after, count - 6, 7):
        caplog.clear()
        with open_session() as session, caplog.at_level(logging.ERROR, "tempo"):
            model = session.protect(network())
            kill_at(session, 1, number, after=after)
            assert losses(model) == pytest.approx(expected, rel=1e-4, abs=1e-6), number
            assert session.stats().flops_trusted == 0
            (incident,) = session.incidents
            assert isinstance(incident.error, WorkerLostError)
            assert "local:1" in incident.address
        assert "going on without it" in caplog.text


def test_a_frozen_worker_is_noticed_and_costs_nothing(caplog):
    with open_session(stall_timeout=3) as session, caplog.at_level(logging.ERROR, "tempo"):
        model = session.protect(network())
        link = session._engine.links[1]
        link.process.send_signal(signal.SIGSTOP)
        assert losses(model) == pytest.approx(losses(network()), rel=1e-4, abs=1e-6)
        (incident,) = session.incidents
    assert "silent for too long" in str(incident)
    assert link.process.poll() is not None  # and nothing is left of it


def test_two_of_three_workers_may_go(caplog):
    with open_session(3, scheme="mix", insecure_small_blocks=True, mix_block=4, mix_row_block=4) as session:
        model = session.protect(network())
        kill_at(session, 1, 4, after=True)
        kill_at(session, 2, 9, after=False)
        with caplog.at_level(logging.ERROR, "tempo"):
            assert losses(model) == pytest.approx(losses(network()), rel=1e-4, abs=1e-6)
        assert len(session.incidents) == 2
        assert "100% of the rows" in str(session.summary())


@pytest.mark.parametrize("number", [2, 11])
def test_the_only_worker_is_waited_for(number, caplog):
    with open_session(1, patience=120) as session, caplog.at_level(logging.WARNING, "tempo"):
        model = session.protect(network())
        kill_at(session, 0, number, after=True)
        assert losses(model) == pytest.approx(losses(network()), rel=1e-4, abs=1e-6)
        assert len(session.incidents) == 1
        assert session.stats().flops_trusted == 0
    assert "no worker is left: waiting up to 120 s" in caplog.text
    assert "is back" in caplog.text


def test_a_lost_worker_takes_part_again_once_it_is_back():
    with open_session(2, patience=120) as session:
        model = session.protect(network())
        kill_at(session, 1, 1, after=True)
        deadline = time.monotonic() + 120
        while len(session._engine.crew.present) < 2 or not session.incidents:
            assert losses(model), "it never came back"
            assert time.monotonic() < deadline, "it never came back"
        back = session._engine.links[2]
        sent = back.bytes_sent
        losses(model)
        assert back.bytes_sent > sent


def test_new_workers_may_join(connect, workers):
    session = connect(1)
    model = session.protect(network())
    expected = losses(network())
    assert losses(model) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    session.add_worker(workers[1])
    measured = session._engine.links[1].bytes_sent
    model = session.protect(network())
    assert losses(model) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert session._engine.links[1].bytes_sent > measured


def test_the_last_worker_is_an_error_that_names_layer_and_worker(caplog):
    with open_session(1) as session:
        model = session.protect(network())
        kill_at(session, 0, 3, after=True)
        with pytest.raises(WorkerLostError, match=r"layer '\d': worker local:0.*connection lost"):
            losses(model)
        assert session.incidents == []


def test_gradients_at_a_lost_worker_are_computed_again_when_they_are_asked_for(caplog):
    """The backward pass is over but for the weights' gradients, which autograd asks for last."""
    plain = network()
    x = torch.randn(12, 3, 6, 6)
    plain(x).square().mean().backward()
    with open_session() as session:
        model = session.protect(copy.deepcopy(network()))
        y = model(x).square().mean()
        engine = session._engine
        settle, engine.settle = engine.settle, lambda: None
        link = engine.links[1]
        hook = model[0].weight.register_hook(lambda g: g)  # keeps the first layer's gradient last
        request = link.request

        def fatal(message, tensors, wants, *rest):
            if "dw" in wants and "dx" not in wants:  # the first layer: nothing comes after it
                link.process.kill()
                link.process.wait()
            return request(message, tensors, wants, *rest)

        link.request = fatal
        y.backward()
        hook.remove()
        engine.settle = settle
        assert len(session.incidents) == 1
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_losing_an_operator_is_said_where_it_weakens_the_scheme(connect):
    session = connect(2, operators=2, scheme="mix-tuned", insecure_small_blocks=True, mix_block=4, mix_row_block=4)
    model = session.protect(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16)))
    x = torch.randn(16, 32)
    expected = model(x)
    session._engine.links[1].close()
    with pytest.warns(ProtectionWarning, match="workers of a single operator are left"):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)

"""Where weights are updated under ``update="auto"``: by bytes, but never where that tells workers more."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import Connect
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tempo.engine.away import residence_of
from tempo.engine.stats import Stats
from tempo.engine.update_cost import update_cost
from tempo.session import Session

ROWS, WIDTH = 64, 48


def session_bytes(session: Session, momentum: float, steps: int) -> Stats:
    """What ``steps`` steps of one layer take, after one that is not counted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    session.protect(model)
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), 1e-3, momentum=momentum))
    before = session.stats()
    for step in range(1 + steps):
        if step == 1:
            before = session.stats()
        optimizer.zero_grad()
        model(torch.randn(ROWS, WIDTH, requires_grad=True)).square().sum().backward()
        optimizer.step()
    return session.stats() - before


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("period", [1, 2, 3, 5])
@pytest.mark.parametrize("scheme", ["tempo-signed", "mix"])
def test_the_model_counts_the_bytes_that_travel(connect: Connect, scheme: str, period: int, momentum: float):
    rekey_rows = period * ROWS - 7
    cost = update_cost(ROWS, rekey_rows, states=1 if momentum else 0)
    activations = 4 * 4 * ROWS * WIDTH
    for update, elements in (("trusted", cost.trusted), ("worker", cost.worker)):
        session = connect(scheme=scheme, update=update, rekey_rows=rekey_rows)
        used = session_bytes(session, momentum, period)
        assert used.bytes_sent + used.bytes_received == period * (activations + 4 * elements * WIDTH**2)
        session.close()


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(0, 3), st.integers(1, 4))
def test_updates_on_workers_save_less_by_rows_and_states_and_more_by_workers(rows, rekey_rows, states, workers):
    saved = update_cost(rows, rekey_rows, states, workers).saved
    assert saved < 1
    assert update_cost(rows + 1, rekey_rows, states, workers).saved <= saved
    assert update_cost(rows, rekey_rows, states + 1, workers).saved < saved
    assert update_cost(rows, rekey_rows, states, workers + 1).saved > saved


@pytest.mark.parametrize(("period", "goes"), [(1, False), (2, False), (3, True)])
def test_auto_updates_on_the_worker_where_that_saves_bytes(connect: Connect, period: int, goes: bool):
    session = connect(scheme="insecure-plain", update="auto", rekey_rows=period * ROWS)
    session_bytes(session, momentum=0.9, steps=1)
    assert bool(session._engine.residences) == goes


@pytest.mark.parametrize("scheme", ["tempo-signed", "mix"])
def test_auto_never_keeps_masks_for_longer_and_says_what_that_costs(connect: Connect, caplog, scheme: str):
    session = connect(scheme=scheme, update="auto")
    with caplog.at_level(logging.INFO, "tempo"):
        used = session_bytes(session, momentum=0.9, steps=3)
    assert used.encryptions["w"] == 3  # fresh masks in each step
    assert not session._engine.residences
    (said,) = [record.message for record in caplog.records if "update='auto'" in record.message]
    assert f"masks of scheme '{scheme}'" in said
    assert "94% at 256, 75% at 1,024, 0% at 4,096 rows per step" in said


def test_auto_keeps_here_what_no_worker_can_run(connect: Connect, caplog):
    session = connect(scheme="insecure-plain", update="auto")
    model = session.protect(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    before = model[0].weight.detach().clone()
    with caplog.at_level(logging.INFO, "tempo"):
        optimizer = session.optimizer(torch.optim.RMSprop(model.parameters()))
    assert "workers cannot run" in caplog.text
    model(torch.randn(ROWS, WIDTH)).square().sum().backward()
    optimizer.step()
    assert residence_of(model[0].weight) is None
    assert not torch.equal(model[0].weight, before)

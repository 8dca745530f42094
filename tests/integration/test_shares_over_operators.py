"""Scheme `split` with workers: plain numbers, liars and losses survived under fresh shares, and what is refused."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path

import pytest
import torch
from adopted import session_with
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import tempo
from tempo.audit.transcript import read
from tempo.errors import (
    IdentityError,
    SchemeError,
    SettingsError,
    UnsafeError,
    WorkerLiedError,
    WorkerLostError,
    WorkerRefusedError,
)
from tempo.schemes.fixed_point import share_rows
from tempo.session import Session
from tempo.settings import Settings
from tempo.wire import identity
from tempo.wire.integers import integers
from tempo.worker.lying import LIES
from tempo.worker.server import Options, Server

SPLIT = {"scheme": "split", "base": "public"}
WIDTH, BITS = 24, Settings().split_weight_bits


class Adapted(nn.Module):
    """Frozen layers of a public base, three of one input and one after them, with an adapter of rank 2 beside one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.q(x) * self.k(x) + self.v(x) + self.up(self.down(x))))


def rounded() -> Adapted:
    """The plain network on the integers that workers have."""
    model = Adapted()
    for layer in (model.q, model.k, model.v, model.out):
        w_q, scales = integers(layer.weight, BITS)
        layer.weight = nn.Parameter(w_q * scales, requires_grad=False)
    return model


def train(model: nn.Module, steps: int = 4) -> list[float]:
    """The loss of every step, and the last gradient of the input."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        x = torch.randn(5, 7, WIDTH, generator=generator, requires_grad=True)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found += [loss.item(), float(x.grad.square().sum()) * 1000]
    return found


PLAIN = pytest.approx(train(rounded()), rel=1e-4)


@pytest.mark.parametrize("colluders", [1, 2])
def test_numbers_are_those_of_plain_training_on_the_same_integers(connect, colluders):
    session = connect(colluders + 1, operators=colluders + 1, split_colluders=colluders, **SPLIT)
    assert train(session.protect(Adapted())) == PLAIN
    where = {line.name: (line.offloaded > 0, line.trusted > 0) for line in session.summary().lines}
    assert where == dict.fromkeys(("q", "k", "v", "out"), (True, False)) | dict.fromkeys(("down", "up"), (False, True))
    assert session.stats().encryptions["g"] > 0


def test_three_operators_take_turns_by_two(connect):
    session = connect(3, operators=3, **SPLIT)
    before = [link.bytes_sent for link in session._engine.links]
    assert train(session.protect(Adapted())) == PLAIN
    assert all(link.bytes_sent > sent for link, sent in zip(session._engine.links, before, strict=True))


@pytest.mark.parametrize("lie", LIES)
def test_a_liar_is_named_and_its_step_repeated_by_the_others(lie, caplog):
    with session_with("", lie, "", **SPLIT) as session, caplog.at_level(logging.ERROR, "tempo"):
        assert train(session.protect(Adapted())) == PLAIN
        (incident,) = session.incidents
        assert session._engine.crew.present == [0, 2]
    assert isinstance(incident.error, WorkerLiedError)
    assert incident.address == "worker1:0@operator1"
    assert "the answer was not used" in caplog.text


def test_with_too_few_left_a_lie_is_an_error():
    with session_with("", "row:3", **SPLIT) as session:
        model = session.protect(Adapted())
        with pytest.raises(WorkerLiedError, match=r"layer '.*worker1"):
            train(model)
        with pytest.raises(SchemeError, match="1 left: nothing was sent"):
            train(model)


def operands(folder: Path) -> dict[str, list[torch.Tensor]]:
    """The shares that each worker got or made, by worker."""
    found: dict[str, list[torch.Tensor]] = {}
    for file in sorted(folder.glob("*/*/*.safetensors")):
        tensors = load_file(file)
        found.setdefault(file.parts[-3], []).extend(tensors[name] for name in ("x", "g") if name in tensors)
    return found


def test_no_share_is_ever_sent_twice_lies_and_losses_notwithstanding(tmp_path, monkeypatch):
    rows = []

    def recorded(x, scales, omega, seeds, out, vectors):
        found = share_rows(x, scales, omega, seeds, out, vectors)
        rows.append((x if scales is None else x * scales, found[0]))
        return found

    monkeypatch.setattr("tempo.schemes.split.share_rows", recorded)
    with session_with("", "row:5", "", "element:9", "", transcripts=tmp_path, patience=0, **SPLIT) as session:
        model = session.protect(Adapted())
        train(model)
        session._engine.links[session._engine.crew.present[0]]._channel.stream.shutdown()
        train(model, 1)
        assert [type(incident.error) for incident in session.incidents] == [WorkerLiedError] * 2 + [WorkerLostError]
    seen = operands(tmp_path)
    assert set(seen) == set("01234")
    shares = [share for worker in seen.values() for share in worker]
    assert len({share.numpy().tobytes() for share in shares}) == len(shares) > 40
    assert all(call.public and call.x.is_floating_point() for call in read(tmp_path / "0")[0].calls)  # as audits do
    # And none is the rows themselves: the positive control is that two shares of one operand give them back.
    plain = {(x / steps).round().int().numpy().tobytes() for x, steps in rows}
    assert not plain & {share.numpy().tobytes() for share in shares}
    sums = {
        ((a.long() + b.long() + 2**31 - 3) % (2**32 - 5) - 2**31 + 3).int().numpy().tobytes()
        for one, other in combinations(seen.values(), 2)
        for a in one
        for b in other
        if a.shape == b.shape
    }
    assert plain & sums


def test_a_liar_that_hangs_up_before_it_is_caught_may_not_come_back(workers):
    with session_with("", "", "", patience=0, **SPLIT) as session:
        for kind in (WorkerLostError, WorkerLiedError, WorkerLiedError):
            error = kind("worker1")
            error.worker = 1
            session._engine.dismiss(error)
        assert [type(incident.error) for incident in session.incidents] == [WorkerLostError, WorkerLiedError]
        with pytest.raises(WorkerRefusedError, match="banned, for it lied"):
            session.add_worker(f"{workers[0]}@operator1")


def test_a_lost_worker_is_replaced_by_another_operator_s(caplog):
    with session_with("", "", "", patience=0, **SPLIT) as session:
        model = session.protect(Adapted())
        first = train(model, 1)
        session._engine.links[0]._channel.stream.shutdown()
        torch.manual_seed(0)
        plain = rounded()
        train(plain, 1)
        assert first + train(model, 3) == pytest.approx(train(rounded(), 1) + train(plain, 3), rel=1e-4)
        (incident,) = session.incidents
        assert isinstance(incident.error, WorkerLostError)


def gradients(model: Adapted, x: torch.Tensor, run) -> list[torch.Tensor]:
    inputs = x.clone().requires_grad_()
    run(model, inputs)
    found = [inputs.grad, model.up.weight.grad]
    model.zero_grad()
    return found


def twice(model: Adapted, x: torch.Tensor) -> None:
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def recomputed(model: Adapted, x: torch.Tensor) -> None:
    checkpoint(model, x, use_reentrant=False).square().mean().backward()


def recomputed_reentrant(model: Adapted, x: torch.Tensor) -> None:
    checkpoint(model, x, use_reentrant=True).square().mean().backward()


@pytest.mark.parametrize("run", [twice, recomputed, recomputed_reentrant])
def test_a_graph_may_be_used_twice_or_recomputed(connect, run):
    session = connect(2, operators=2, **SPLIT)
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(2))
    found, expected = gradients(session.protect(Adapted()), x, run), gradients(rounded(), x, run)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_without_gradients_none_are_sent(connect):
    session = connect(2, operators=2, **SPLIT)
    model, x = session.protect(Adapted()), torch.randn(6, WIDTH)
    with torch.no_grad():
        assert torch.allclose(model(x), rounded()(x), rtol=1e-4, atol=1e-5)
    assert session.stats().encryptions["x"] > 0 == session.stats().encryptions["g"]


# --- what is not public -----------------------------------------------------------------------------------------------


def reasons(session: Session) -> dict[str, str]:
    return {line.name: line.reason for line in session.summary().lines}


@pytest.mark.parametrize("calls", [0, 3])
def test_a_weight_that_an_adapter_was_merged_into_is_never_sent(tmp_path, calls):
    """Through ``.data``, as PEFT merges: before it was sent, or after; alone, or in a group with others."""
    with session_with("", "", transcripts=tmp_path, **SPLIT) as session:
        model = session.protect(Adapted())
        x = torch.randn(6, WIDTH)
        for _ in range(calls):
            model(x)
        model.k.weight.data += model.up.weight @ model.down.weight
        merged = model.k.weight.detach()
        for _ in range(3):
            found = model(x)
        assert "not the one that was protected as public" in reasons(session)["k"]
        plain = rounded()
        plain.k.weight = nn.Parameter(merged)
        assert torch.allclose(found, plain(x), rtol=1e-3, atol=1e-4)
    stored = [load_file(file)["w"] for file in tmp_path.glob("*/*/*-store.safetensors")]
    rows = {tuple(row.tolist()) for w in stored for row in w}
    assert stored
    assert not rows & {tuple(row.tolist()) for row in integers(merged, BITS)[0]}
    assert rows >= {tuple(row.tolist()) for row in integers(model.q.weight, BITS)[0]}  # the control


def test_a_weight_that_trains_stays(connect):
    session = connect(2, operators=2, **SPLIT)
    model = session.protect(Adapted())
    model.q.weight.requires_grad_(True)
    train(model, 1)
    assert "its weight is trained" in reasons(session)["q"]


@pytest.mark.parametrize("base", ["auto", "secret"])
def test_a_base_has_to_be_said_to_be_public(connect, base):
    session = connect(2, operators=2, scheme="split", base=base)
    with pytest.raises(SettingsError, match="base='public'"):
        session.protect(Adapted())


def test_a_weight_that_changes_between_placing_and_sending_is_not_sent(connect, monkeypatch):
    session = connect(2, operators=2, **SPLIT)
    model = session.protect(Adapted())
    monkeypatch.setattr("tempo.engine.site.Site.secret", lambda site, weight: None)
    model.out.weight.data += 1
    with pytest.raises(UnsafeError, match="was not sent"):
        model(torch.randn(6, WIDTH))


# --- whose workers they are -------------------------------------------------------------------------------------------


def test_one_operator_cannot_have_two_workers(connect, workers):
    with pytest.raises(SchemeError, match="distinct operators"):
        connect(2, **SPLIT)
    session = connect(2, operators=2, **SPLIT)
    with pytest.raises(WorkerRefusedError, match="'operator0', too"):
        session.add_worker(f"{workers[2]}@operator0")
    session.add_worker(f"{workers[2]}@operator2")


def test_one_worker_is_too_few(connect):
    with pytest.raises(SchemeError, match=r"needs 2 workers; 1 given\. Scheme .mix-tuned. makes do with one"):
        connect(1, **SPLIT)


Listen = Callable[[str], str]


@pytest.fixture
def listen(tmp_path: Path) -> Iterator[Listen]:
    """Start a worker over TLS that shows the certificate of that name, and return its address.

    Certificates ``a``, ``b`` and ``c`` lie in ``peers`` of ``tmp_path``; `bind` says which operator's they are.
    """
    _, pub, _ = identity.generate(tmp_path, "trusted")
    for name in "abc":
        identity.generate(tmp_path, name)
        shutil.copy(tmp_path / f"{name}.pub", tmp_path / "peers")
    with ExitStack() as stack:

        def start(certificate: str) -> str:
            server = Server(Options(identity=tmp_path / f"{certificate}.key", peers=pub))
            address = server.listen("127.0.0.1:0")
            thread = threading.Thread(target=server.accept_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.close)
            return address

        yield start


def bind(folder: Path, **operators: str) -> dict[str, str]:
    """Put certificates, by the letters of their names, into operators' folders; settings to connect with."""
    for operator, names in operators.items():
        (folder / "peers" / operator).mkdir()
        for name in names:
            shutil.copy(folder / f"{name}.pub", folder / "peers" / operator)
    keys = {"identity": str(folder / "trusted.key"), "peers": str(folder / "peers")}
    return {"placement": "all", "divide_flops": 1} | keys


def test_operators_are_who_their_folders_say(tmp_path, listen):
    settings = bind(tmp_path, one="a", two="bc")
    workers = [f"{listen('a')}@one", f"{listen('c')}@two"]
    with tempo.connect(*workers, **settings, **SPLIT) as session:
        assert train(session.protect(Adapted())) == PLAIN


def test_a_worker_cannot_stand_in_for_another_operator_s(tmp_path, listen):
    """It would have both shares. Its certificate is trusted, but as another operator's: nothing is sent to it."""
    settings = bind(tmp_path, one="ac", two="b")
    impostor, honest = f"{listen('c')}@two", f"{listen('a')}@one"
    for scheme in (SPLIT, {"scheme": "tempo"}):
        with pytest.raises(IdentityError, match=rf"worker {impostor}: it showed a certificate of operator 'one'"):
            tempo.connect(honest, impostor, **settings, **scheme)
    with tempo.connect(honest, f"{listen('b')}@two", **settings, **SPLIT) as session:
        assert train(session.protect(Adapted())) == PLAIN


def test_an_operator_without_a_folder_is_refused_where_operators_must_differ(tmp_path, listen):
    settings = bind(tmp_path, one="a", two="b")
    one, two, three = f"{listen('a')}@one", f"{listen('b')}@two", f"{listen('c')}@three"
    folder = tmp_path / "peers" / "three"
    with pytest.raises(SchemeError, match=rf"worker {three}: nothing says .* make the folder {folder} and copy"):
        tempo.connect(one, three, **settings, **SPLIT)
    with tempo.connect(one, two, **settings, **SPLIT) as session:
        with pytest.raises(WorkerRefusedError, match=rf"distinct operators; nothing says .*{folder}"):
            session.add_worker(three)
        bind(tmp_path, three="c")
        session.add_worker(three)
        assert train(session.protect(Adapted())) == PLAIN


def test_without_operators_folders_other_schemes_work_as_ever(tmp_path, listen):
    with tempo.connect(listen("a"), listen("b"), scheme="tempo", **bind(tmp_path)) as session:
        assert train(session.protect(Adapted())) == pytest.approx(train(Adapted()), rel=1e-4)

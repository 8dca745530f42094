"""The trusted end: nothing but what was asked for is accepted, and nobody waits for ever."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from tempo.engine.link import ACKNOWLEDGED, Link
from tempo.errors import WorkerFailedError, WorkerLostError, WorkerRefusedError, WorkerUnreachableError
from tempo.settings import Settings
from tempo.wire.address import Address
from tempo.wire.channel import Channel
from tempo.wire.frame import TO_WORKER, encode
from tempo.wire.messages import (
    PROTOCOL,
    Failure,
    Forward,
    Hello,
    Linear,
    Probe,
    Result,
    Segment,
    Store,
    ToTrusted,
    ToWorker,
    Welcome,
)
from tempo.wire.stream import SocketStream
from tempo.wire.tensors import size_of

from .conftest import SESSION, SETTINGS, InProcess

Start = Callable[..., InProcess]
ADDRESS = Address(host="forger", operator="forger")
WELCOME = Welcome(PROTOCOL, "test", "cpu", 1 << 30)
FORWARD = Forward(step=0, layer=1, weight=1, operand=0, product=Linear())
WANTS = {"y": ((2, 3), torch.float32)}


class Forger:
    """A worker that answers each request as it is told to."""

    def __init__(self, sock: socket.socket, answer: Callable[[Forward], bytes], welcome: ToTrusted) -> None:
        self._sock, self._answer, self._welcome = sock, answer, welcome
        self._channel = Channel(SocketStream(sock, descriptors=True), TO_WORKER, lambda _: 1 << 40)

    def run(self) -> None:
        try:
            while True:
                message = self._channel.receive(lambda _: None)
                if isinstance(message, Hello):
                    self._channel.send(self._welcome)
                elif not isinstance(message, Segment):
                    self._sock.sendall(self._answer(message))
        except (EOFError, OSError):
            self._channel.close()


@pytest.fixture
def forge(stack: ExitStack) -> Callable[..., Link]:
    """A link to a forger."""

    def start(answer: Callable[[Forward], bytes], welcome: ToTrusted = WELCOME, settings: Settings = SETTINGS) -> Link:
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=Forger(theirs, answer, welcome).run)
        thread.start()
        stack.callback(thread.join)
        link = Link.adopt(ours, ADDRESS, settings=settings, session=SESSION)
        stack.callback(link.close)
        return link

    return start


def frame(message: ToWorker | ToTrusted) -> bytes:
    return encode(message) + bytes(sum(size_of(ref) for ref in getattr(message, "tensors", ()) if ref.segment < 0))


def result(message: Forward, **changes: object) -> bytes:
    return frame(Result(message.id, 0, (replace(message.wants[0], **changes),)))


FORGED = {
    "another shape": lambda m: result(m, shape=(3, 2)),
    "a larger shape": lambda m: result(m, shape=(2, 3000)),
    "another dtype": lambda m: result(m, dtype="float16"),
    "another name": lambda m: result(m, name="dx"),
    "another place": lambda m: result(m, segment=0, offset=1 << 20),
    "another request": lambda m: frame(Result(m.id + 1000, 0, m.wants)),
    "no tensor": lambda m: frame(Result(m.id, 0, ())),
    "too many tensors": lambda m: frame(Result(m.id, 0, (*m.wants, replace(m.wants[0], name="z")))),
    "truncated": lambda m: result(m)[:-1],
    "the same twice": lambda m: result(m) * 2,
    "a failure of nothing": lambda m: frame(Failure(m.id + 1000, "failed", "")),
    "a second welcome": lambda m: encode(WELCOME),
    "a request": lambda m: encode(m),
    "noise": lambda m: os.urandom(64),
}


@pytest.mark.parametrize("capabilities", [(), ("shm",)], ids=["inline", "shared"])
@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
def test_a_forged_answer_ends_the_link(
    forge: Callable[..., Link], forged: Callable[[Forward], bytes], capabilities: tuple[str, ...]
) -> None:
    received = []

    def answer(message: Forward) -> bytes:
        received.append(message)
        return forged(message) if len(received) == 1 else b""

    link = forge(answer, replace(WELCOME, capabilities=capabilities))
    first = link.request(FORWARD, {"x": torch.ones(2, 3)}, WANTS)["y"]
    second = link.request(FORWARD, {"x": torch.ones(2, 3)}, WANTS)["y"]
    if forged is FORGED["truncated"]:
        link._channel.stream.shutdown()
    with pytest.raises(WorkerLostError, match="forger"):
        second.result(20)
    if forged is not FORGED["the same twice"]:
        assert isinstance(first.exception(20), WorkerLostError)
    later = link.request(FORWARD, {"x": torch.ones(2, 3)}, WANTS)["y"]
    assert isinstance(later.exception(20), WorkerLostError)


def test_what_a_worker_says_is_made_printable(forge: Callable[..., Link]) -> None:
    link = forge(lambda m: frame(Failure(m.id, "failed", "\x1b[31mred\n" + "x" * 900)))
    error = link.request(FORWARD, {"x": torch.ones(2, 3)}, WANTS)["y"].exception(20)
    assert isinstance(error, WorkerFailedError)
    assert str(error).isprintable()
    assert len(str(error)) < 700


def test_a_silent_worker_is_lost(forge: Callable[..., Link]) -> None:
    link = forge(lambda _: b"", settings=Settings(stall_timeout=0.05))
    error = link.request(FORWARD, {"x": torch.ones(2, 3)}, WANTS)["y"].exception(20)
    assert isinstance(error, WorkerLostError)
    assert "silent for too long" in str(error)


@pytest.mark.parametrize("transport", ["shm", "tcp", "tls"])
def test_an_idle_link_lives_on_by_signs_of_life(
    start: Callable[..., InProcess], transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempo.worker.session.BEAT", 0.01)
    link = start(tls=transport == "tls").link(transport)
    link._channel.stream.set_timeout(0.5)
    link._receiver.join(0.8)
    assert link._receiver.is_alive()
    link.request(Store(step=0, layer=0, weight=7), {"w": torch.eye(3)}, {})[ACKNOWLEDGED].result(20)


@pytest.mark.parametrize("welcome", [Failure(0, "refused", "go away"), replace(WELCOME, protocol=99)])
def test_a_refusal_is_reported(forge: Callable[..., Link], welcome: ToTrusted) -> None:
    with pytest.raises(WorkerRefusedError, match=r"go away|same version"):
        forge(lambda _: b"", welcome)


def test_unreachable_workers_are_explained(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    plain = Settings(insecure_no_tls=True)
    with pytest.raises(WorkerUnreachableError, match=f"tempo worker --listen 127.0.0.1:{port}"):
        Link.connect(Address.parse(f"127.0.0.1:{port}"), settings=plain, session=SESSION)
    with pytest.raises(WorkerUnreachableError, match="nothing listens"):
        Link.connect(Address.parse(f"unix:{tmp_path}/none.sock"), settings=plain, session=SESSION)


def test_a_unix_socket_is_for_its_user_and_goes_with_the_worker(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    worker = start()
    address = worker.listen(f"unix:{path}")
    assert path.stat().st_mode & 0o077 == 0
    link = Link.connect(address, settings=SETTINGS, session=SESSION)
    assert link.measure().latency_s > 0
    link.close()
    worker.server.close()
    assert not path.exists()


def test_closing_is_idempotent_and_leaves_nothing_behind(start: Start) -> None:
    worker = start()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    link = worker.link()
    link.request(Store(step=0, layer=0, weight=1), {"w": torch.ones(4, 4)}, {})[ACKNOWLEDGED].result()
    link.close()
    link.close()
    while worker._stack._exit_callbacks:  # waits for the session's thread
        worker._stack.pop_all().close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert not [thread for thread in threading.enumerate() if thread is link._receiver]
    error = link.request(Probe(size=0), {}, {})[ACKNOWLEDGED].exception(20)
    assert isinstance(error, WorkerLostError)


def test_a_forked_child_cannot_hang_up_for_its_parent(start: Start) -> None:
    link = start().link()
    child = os.fork()
    if child == 0:
        try:
            link.close()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    link.request(Probe(size=0), {}, {})[ACKNOWLEDGED].result(20)


def test_counters(start: Start) -> None:
    link = start().link()
    link.request(Store(step=0, layer=0, weight=1), {"w": torch.ones(3, 3)}, {})[ACKNOWLEDGED].result()
    link.request(FORWARD, {"x": torch.ones(2, 3)}, WANTS)["y"].result()
    assert (link.bytes_sent, link.bytes_received) == (36 + 24, 24)
    assert link.worker_nanoseconds > 0
    assert link.welcome.device == "cpu"

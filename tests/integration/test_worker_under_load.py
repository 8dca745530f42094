"""One worker, many sessions, and clients that mean it no good: the honest get their numbers, and their turns."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import hostile
import pytest
import small_job
import torch
from small_job import network

import tempo
from tempo.engine.link import ACKNOWLEDGED, Link
from tempo.errors import WorkerOutOfMemoryError, WorkerRefusedError
from tempo.settings import Settings
from tempo.wire.address import Address
from tempo.wire.messages import Forward, Linear, Store
from tempo.worker import door
from tempo.worker.compute import TorchCompute
from tempo.worker.server import Options, Server

SESSIONS = 16
LIMIT = 256 << 20

losses = partial(small_job.losses, steps=2)


class Listening:
    """A worker in this process, to look into while it is under load."""

    def __init__(self, stack: ExitStack, **options: str) -> None:
        self.server = Server(Options(insecure_no_tls=True, **options))
        self.address = self.server.listen("127.0.0.1:0")
        parsed = Address.parse(self.address)
        self.where = parsed.host, parsed.port
        self.budget = self.server._budget
        thread = threading.Thread(target=self.server.accept_forever)
        thread.start()
        stack.callback(thread.join)
        stack.callback(self.server.close)

    def link(self) -> Link:
        settings = Settings(insecure_no_tls=True)
        return Link.connect(Address.parse(self.address), settings=settings, session="0123456789abcdef")

    def connect(self) -> tempo.Session:
        return tempo.connect(
            self.address, insecure_no_tls=True, scheme="tempo", base="secret", placement="all", divide_flops=1
        )

    @contextmanager
    def beside(self, client: hostile.Client) -> Iterator[None]:
        """A hostile client that goes on until the context ends, again whenever it is hung up on."""
        stop = threading.Event()

        def disturb() -> None:
            while not stop.is_set():
                try:
                    client(self.where, stop)
                except OSError:
                    continue

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@pytest.fixture
def listen() -> Iterator[Callable[..., Listening]]:
    with ExitStack() as stack:
        yield lambda **options: Listening(stack, **{"memory_limit": str(LIMIT)} | options)


def settled(condition: Callable[[], bool]) -> bool:
    """Whether it comes true; what ended on this side may still be ending on the other."""
    return any(condition() or threading.Event().wait(0.02) for _ in range(1000))


def resources() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def test_sixteen_sessions_at_once_get_their_numbers_and_leave_nothing_behind(listen) -> None:
    worker = listen()
    expected = losses(network())
    models = [network() for _ in range(SESSIONS)]  # seeds torch's one generator, so not in threads
    found: dict[int, list[float]] = {}
    before = resources()

    def work(number: int) -> None:
        with worker.connect() as session:
            found[number] = losses(session.protect(models[number]))
            assert session.stats().flops_trusted == 0

    threads = [threading.Thread(target=work, args=(number,)) for number in range(SESSIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == SESSIONS
    for numbers in found.values():
        assert numbers == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert settled(lambda: worker.budget.used == 0 and resources() <= before)


def test_who_asks_for_too_much_is_told_and_the_others_do_not_notice(listen) -> None:
    worker = listen(session_limit=str(LIMIT // 2))
    where = {"step": 0, "layer": 0}

    def store(link: Link, number: int, mebibytes: int) -> None:
        w = torch.zeros(mebibytes << 18)
        link.request(Store(**where, weight=number), {"w": w}, {})[ACKNOWLEDGED].result(60)

    greedy, modest = worker.link(), worker.link()
    store(modest, 1, 16)
    for number in range(1, 8):
        store(greedy, number, 16)
    for number in range(8, 12):
        with pytest.raises(WorkerOutOfMemoryError, match=r"would exceed a session's limit of 128\.0 MiB"):
            store(greedy, number, 32)
    store(modest, 2, 64)  # the greedy one holds all that it may
    assert worker.budget.used <= LIMIT
    for link in greedy, modest:
        link.close()
    assert settled(lambda: worker.budget.used == 0)


def test_nobody_gives_up_reserves_for_a_request_that_fails_all_the_same(listen) -> None:
    worker = listen()
    with worker.connect() as session:
        losses(session.protect(network()))
        account = next(iter(worker.budget._accounts))
        assert settled(lambda: account.spare > 0)
        spare = account.spare
        greedy = worker.link()
        refused = greedy.request(Store(step=0, layer=0, weight=1), {"w": torch.zeros(LIMIT // 4)}, {})[ACKNOWLEDGED]
        assert isinstance(refused.exception(60), WorkerOutOfMemoryError)
        greedy.close()
        assert account.spare >= spare


@pytest.mark.parametrize("name", [name for name in hostile.CLIENTS if name != "nobody"])
def test_an_honest_session_finishes_beside_a_hostile_client(listen, name: str) -> None:
    worker = listen()
    expected = losses(network())
    before = resources()
    most = [0, 0]
    with worker.beside(hostile.CLIENTS[name]), worker.connect() as session:
        model = session.protect(network())
        assert losses(model) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        most = resources()
        assert worker.budget.used <= LIMIT
        assert session.incidents == []
    bound = door.GREETING_LIMIT + 32
    assert most[0] - before[0] <= 3 * bound
    assert most[1] - before[1] <= 3 * bound
    assert settled(lambda: worker.budget.used == 0)
    assert settled(lambda: resources() <= before)


# --- turns ---


class Queue(deque[threading.Lock]):
    """Those who wait for a turn; keeps a log of who asks, and of whose work begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.log: list[tuple[str, str]] = []
        multiply = TorchCompute._multiply

        def logged(*arguments) -> None:
            self.log.append(("has", threading.current_thread().name))
            multiply(*arguments)

        monkeypatch.setattr(TorchCompute, "_multiply", logged)

    def append(self, gate: threading.Lock) -> None:
        self.log.append(("asks", threading.current_thread().name))
        super().append(gate)


@pytest.mark.parametrize("client", [hostile.products, hostile.large_products], ids=["as large", "much larger"])
def test_who_floods_gets_one_turn_and_then_it_is_that_of_who_asked(listen, client, monkeypatch) -> None:
    worker = listen()
    queue = worker.server._compute._turns._waiting = Queue(monkeypatch)
    link = worker.link()
    honest = f"compute 127.0.0.1:{link._channel.stream._sock.getsockname()[1]}"
    x, wants = torch.randn(256, 512), {"y": ((256, 512), torch.float32)}
    link.request(Store(step=0, layer=0, weight=1), {"w": torch.eye(512)}, {})[ACKNOWLEDGED].result(60)
    with worker.beside(client):
        for _ in range(1000):
            message = Forward(step=0, layer=0, weight=1, operand=0, product=Linear())
            torch.testing.assert_close(link.request(message, {"x": x}, wants)["y"].result(60), x)
            if queue.log.count(("asks", honest)) >= 10:
                break
    link.close()
    asked = [number for number, entry in enumerate(queue.log) if entry == ("asks", honest)]
    assert len(asked) >= 10, "it never had to wait"
    for number in asked:
        served = [name for what, name in queue.log[number:] if what == "has"]
        assert honest in served[:2]  # one turn may have been given already


# --- strangers ---


def test_a_flood_of_strangers_shows_the_oldest_of_them_out(listen, monkeypatch) -> None:
    monkeypatch.setattr(door, "GREETING_LIMIT", 4)
    worker = listen()
    with worker.connect() as session, ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(worker.where, 20)) for _ in range(12)]
        for stranger in strangers[:8]:
            assert stranger.recv(1) == b""  # hung up on
        model = session.protect(network())
        assert losses(model) == pytest.approx(losses(network()), rel=1e-4, abs=1e-6)
        late = stack.enter_context(worker.connect())  # and there is room for who says hello
        assert losses(late.protect(network())) == pytest.approx(losses(network()), rel=1e-4, abs=1e-6)
        strangers[-1].settimeout(0.01)
        with pytest.raises(TimeoutError):
            strangers[-1].recv(1)  # still waited for


def test_who_comes_when_all_places_are_taken_is_turned_away(listen, monkeypatch) -> None:
    monkeypatch.setattr(door, "CONNECTION_LIMIT", 2)
    worker = listen()
    links = [worker.link(), worker.link()]
    with pytest.raises(WorkerRefusedError, match="ended the connection at once"):
        worker.link()
    links.pop().close()
    assert settled(lambda: worker.server._door._count < 2)
    links.append(worker.link())
    for link in links:
        link.close()


def test_half_a_frame_and_an_unread_answer_have_an_end(listen, monkeypatch) -> None:
    monkeypatch.setattr("tempo.worker.session.STALLED", 0.3)
    worker = listen()
    for client in hostile.half_a_frame, hostile.never_reads:
        client(worker.where, threading.Event())  # returns when it is hung up on
    assert settled(lambda: worker.budget.used == 0)
    monkeypatch.setattr("tempo.wire.channel.HEADER_TIMEOUT", 0.2)
    with hostile.connected(worker.where, greet=False) as sock:
        for byte in hostile.HELLO:
            sock.send(bytes([byte]))  # a byte at a time
            threading.Event().wait(0.02)
        pytest.fail("it was waited for")

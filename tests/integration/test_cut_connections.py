"""Connections that go silent without being closed: the others finish the step with the same numbers."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import multiprocessing
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import pytest
import small_job
import torch
from relay import WAYS, Relay, tcp_pair
from small_job import network

from tempo.engine.link import ACKNOWLEDGED, Link
from tempo.errors import WorkerLostError
from tempo.session import Session, connect
from tempo.settings import Settings, parse
from tempo.wire.address import Address
from tempo.wire.messages import Store
from tempo.worker.server import Options, Server

NAME = "0123456789abcdef"
STALL = 0.7

losses = partial(small_job.losses, steps=2)


def settings(**fields: object) -> Settings:
    common = {"scheme": "tempo", "base": "secret", "placement": "all", "divide_flops": 1, "insecure_no_tls": True}
    return parse(common | fields)


class Wire:
    """Workers in this process, each behind a relay."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.relays: list[Relay] = []

    def link(self, settings: Settings) -> Link:
        ours, near = tcp_pair()
        far, theirs = tcp_pair()
        thread = threading.Thread(target=Server(Options(insecure_no_tls=True)).serve, args=(theirs, "relayed"))
        thread.start()
        self._stack.callback(thread.join)
        self.relays.append(Relay(near, far))
        self._stack.callback(self.relays[-1].close)
        number = len(self.relays)
        address = Address(host=f"worker{number}", operator=f"operator{number}")
        link = Link.adopt(ours, address, settings=settings, session=NAME)
        self._stack.callback(link.close)
        link._channel.stream.set_timeout(STALL, sending=60)
        link._stall_timeout = STALL  # the least that a user may choose takes longer than a test should
        return link


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    monkeypatch.setattr("tempo.worker.session.BEAT", 0.05)
    with ExitStack() as stack:
        yield Wire(stack)


def at_request(link: Link, number: int, strike: Callable[[], None]) -> None:
    """Let something happen just before the link's request of that number."""
    count, request = [0], link.request

    def struck(*arguments):
        count[0] += 1
        if count[0] == number:
            strike()
        return request(*arguments)

    link.request = struck


@pytest.mark.parametrize("way", WAYS)
def test_a_connection_cut_at_any_moment_costs_nothing(wire: Wire, way: str, caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(way)
    chosen = settings(patience=0)
    links = [wire.link(chosen) for _ in range(2)]
    with Session(links, chosen, NAME) as session, caplog.at_level(logging.ERROR, "tempo"):
        model = session.protect(network())
        at_request(links[1], chance.randint(1, 20), lambda: wire.relays[1].cut(way))
        assert losses(model) == pytest.approx(losses(network()), rel=1e-4, abs=1e-6)
        (incident,) = session.incidents
        assert isinstance(incident.error, WorkerLostError)
        assert ("reached it" if way == "there" else "silent for too long") in str(incident)
        assert session.stats().flops_trusted == 0


@pytest.mark.parametrize("transport", ["rest in flight", "rest not sent"])
def test_a_cut_in_the_middle_of_an_operand_is_noticed_by_who_still_hears(wire: Wire, transport: str) -> None:
    size = 300 if transport == "rest in flight" else 3000  # fits into the sockets' buffers, or does not
    link = wire.link(settings(patience=0))
    w = torch.ones(size, size)
    link.request(Store(step=0, layer=1, weight=1), {"w": w}, {})[ACKNOWLEDGED].result(60)
    wire.relays[0].cut_after("there", w.nbytes // 2)
    future = link.request(Store(step=0, layer=1, weight=2), {"w": w}, {})[ACKNOWLEDGED]
    with pytest.raises(WorkerLostError, match="nothing of a request reached it"):
        future.result(60)


# --- a network of our own, whose only link goes down ---

UP = 1
CANNOT = 77


def set_loopback(flags: int) -> None:
    """``ip link set lo up`` or ``down``."""
    with socket.socket() as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", flags))  # SIOCSIFFLAGS


def in_a_network_of_its_own(folder: str) -> None:
    """A worker over TCP whose network goes down in the middle of a step, one over a Unix socket, and a training run."""
    if ctypes.CDLL(None).unshare(0x10000000 | 0x40000000):  # CLONE_NEWUSER, CLONE_NEWNET
        os._exit(CANNOT)
    torch.set_num_threads(1)
    set_loopback(UP)
    expected = losses(network())
    with ExitStack() as stack:
        addresses = []
        for where in "127.0.0.1:0", f"unix:{folder}/worker.sock":
            server = Server(Options(insecure_no_tls=True))
            addresses.append(server.listen(where))
            threading.Thread(target=server.accept_forever, daemon=True).start()
            stack.callback(server.close)
        session = stack.enter_context(connect(*addresses, settings=settings(stall_timeout=3, patience=60)))
        model = session.protect(network())
        at_request(session._engine.links[0], 7, lambda: set_loopback(0))
        assert losses(model) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        (incident,) = session.incidents
        assert "127.0.0.1" in incident.address, incident
        set_loopback(UP)
        deadline = time.monotonic() + 60
        while len(session._engine.crew.present) < 2:
            assert time.monotonic() < deadline, "it never came back"
            assert losses(session.protect(network())) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        alone = stack.enter_context(connect(addresses[0], settings=settings(stall_timeout=3, patience=1)))
        at_request(alone._engine.links[0], 5, lambda: set_loopback(0))
        with pytest.raises(WorkerLostError, match=r"layer .*worker 127"):
            losses(alone.protect(network()))
    os._exit(0)


def test_a_network_that_goes_down_and_comes_back(tmp_path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tempo.session", "tempo.worker.server"])
    process = context.Process(target=in_a_network_of_its_own, args=(str(tmp_path),))
    process.start()
    process.join(120)
    process.kill()
    process.join()
    code = process.exitcode
    process.close()
    if code == CANNOT:
        pytest.skip("this machine allows no network namespaces to this user")
    assert code == 0

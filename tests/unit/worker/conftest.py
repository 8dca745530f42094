"""A worker inside the test process: real server, real sockets, no start-up time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tempo.engine.link import Link
from tempo.settings import Settings
from tempo.wire import identity
from tempo.wire.address import Address
from tempo.worker.server import Options, Server

SETTINGS = Settings(connect_timeout=20.0, request_timeout=60.0)
SESSION = "0123456789abcdef"


class InProcess:
    """One worker, and ways to reach it."""

    def __init__(self, stack: ExitStack, folder: Path, **options: Any) -> None:
        self._stack, self._folder = stack, folder
        self.server = Server(Options(**options))
        self.sessions: list[threading.Thread] = []

    def socket(self) -> socket.socket:
        """Our end of a socket pair whose other end a session of the worker serves."""
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=self.server.serve, args=(theirs, "test"))
        thread.start()
        self.sessions.append(thread)
        self._stack.callback(thread.join)
        self._stack.callback(ours.close)
        return ours

    def listen(self, where: str = "127.0.0.1:0") -> Address:
        """Accept connections; returns where."""
        address = Address.parse(self.server.listen(where))
        thread = threading.Thread(target=self.server.accept_forever)
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(self.server.close)
        return address

    def link(self, transport: str = "shm", session: str = SESSION) -> Link:
        """A link to the worker: ``shm``, ``tcp`` or ``tls``."""
        if transport == "shm":
            address = Address(host="test", operator="test")
            link = Link.adopt(self.socket(), address, settings=SETTINGS, session=session)
        elif transport == "tcp":
            link = Link.connect(self.listen(), settings=Settings(insecure_no_tls=True), session=session)
        else:
            mine = str(self._folder / "trusted.key")
            settings = Settings(identity=mine, peers=str(self._folder / "worker.pub"))
            link = Link.connect(self.listen(), settings=settings, session=session)
        self._stack.callback(link.close)
        return link


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closed after the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def start(stack: ExitStack, tmp_path: Path) -> Callable[..., InProcess]:
    """Start a worker with the given options; ``tls=True`` makes key pairs for both sides first."""

    def start_worker(*, tls: bool = False, **options: Any) -> InProcess:
        if tls:
            key, _, _ = identity.generate(tmp_path, "worker")
            _, pub, _ = identity.generate(tmp_path, "trusted")
            options |= {"identity": key, "peers": pub}
        else:
            options.setdefault("insecure_no_tls", True)
        return InProcess(stack, tmp_path, **options)

    return start_worker

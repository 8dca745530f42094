"""The worker process: what it listens on, and one thread for each connection."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import torch

from tempo.errors import IdentityError, ProtocolError, SettingsError, WorkerFailedError
from tempo.wire import identity
from tempo.wire.address import Address
from tempo.wire.sealed import leave_tls
from tempo.wire.stream import SocketStream, Stream
from tempo.worker.base import BITS, Base
from tempo.worker.budget import Budget, human, parse_size
from tempo.worker.compute import Compute, TorchCompute
from tempo.worker.door import CONNECTION_LIMIT, Door
from tempo.worker.lying import LyingCompute
from tempo.worker.null import NullCompute
from tempo.worker.session import STALLED, Session

HANDSHAKE_TIMEOUT = 10.0
PRESSED = 0.01
"""Seconds from one connection to the next while too many owe their hello: time to say it, and to serve the others."""

log = logging.getLogger("tempo.worker")


@final
@dataclass(frozen=True, slots=True)
class Options:
    """How a worker runs; the command line's flags."""

    device: str = "cpu"
    memory_limit: str = ""
    session_limit: str = ""
    transcript: Path | None = None
    identity: Path | None = None
    peers: Path | None = None
    insecure_no_tls: bool = False
    null: bool = False
    insecure_lie: str = ""
    base: tuple[Path, ...] = ()
    base_bits: tuple[int, ...] = BITS


@final
class Server:
    """Serves any number of connections at once, each one a session of its own."""

    def __init__(self, options: Options) -> None:
        if options.null and options.transcript:
            raise SettingsError("--null computes nothing, so there is nothing for --transcript to record")
        self._options = options
        self._compute = _compute(options)
        self._budget = Budget(
            parse_size(options.memory_limit) if options.memory_limit else _memory(self._compute),
            parse_size(options.session_limit) if options.session_limit else None,
            self._compute.device.allocate,
        )
        self._base = Base(options.base, options.base_bits)
        self._door = Door()
        self._listener: socket.socket | None = None
        self._closed = threading.Event()
        log.info("device %s, memory limit %s", self._compute.description, human(self._budget.limit))

    def serve(self, sock: socket.socket, peer: str) -> None:
        """Serve one connected socket without TLS, until it ends."""
        self._run(_plain(sock), peer, lambda: None)

    def listen(self, where: str) -> str:
        """Bind to ``HOST:PORT`` or ``unix:PATH``; returns where, with the port that was chosen for port 0."""
        address = Address.parse(where)
        if address.path:
            self._listener = _listen_unix(Path(address.path))
            return where
        if not self._options.insecure_no_tls:
            self._context()  # fail now, not at the first connection
        try:
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            self._listener = socket.create_server((address.host, address.port), family=family, backlog=64)
        except OSError as error:
            raise WorkerFailedError(f"cannot listen on {where}: {error.strerror or error}") from error
        host, port = self._listener.getsockname()[:2]
        return str(Address(host=host, port=port, operator=host))

    def accept_forever(self) -> None:
        """Accept connections until `close`."""
        while (listener := self._listener) is not None:
            try:
                sock, name = listener.accept()
            except OSError as error:
                if self._listener is not None:
                    log.warning("cannot accept: %s", error)
                    self._closed.wait(1.0)  # too many open files, most likely: some will be closed
                continue
            self._let_in(sock, f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "unix")
            if self._door.crowded:
                self._closed.wait(PRESSED)

    def close(self) -> None:
        """Stop listening; open sessions go on."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._closed.set()
        path = listener.getsockname() if listener.family == socket.AF_UNIX else None
        try:
            listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept
        finally:
            listener.close()
            if path:
                Path(path).unlink(missing_ok=True)

    def _let_in(self, sock: socket.socket, peer: str) -> None:
        try:
            if not self._door.enter(sock):
                log.warning("%s: turned away, %d connections are open", peer, CONNECTION_LIMIT)
                sock.close()
                return
        except OSError as error:
            log.warning("%s: turned away: %s", peer, error)
            sock.close()
            return
        try:
            threading.Thread(target=self._admit, args=(sock, peer), name=peer, daemon=True).start()
        except RuntimeError as error:  # the system has no thread left for this process
            log.warning("%s: turned away: %s", peer, error)
            sock.close()
            self._door.leave(sock)

    def _admit(self, sock: socket.socket, peer: str) -> None:
        try:
            if sock.family != socket.AF_UNIX:  # a host that vanished, or a client that never reads its answers
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALLED * 1000))
            if sock.family == socket.AF_UNIX or self._options.insecure_no_tls:
                stream: Stream = _plain(sock)
            else:
                stream = leave_tls(identity.accept(sock, self._context(), HANDSHAKE_TIMEOUT), server=True)
            self._run(stream, peer, partial(self._door.greeted, sock))
        except (IdentityError, ProtocolError, OSError) as error:
            log.warning("%s: refused: %s", peer, error)
            sock.close()
        except Exception:
            log.exception("%s: session ended by a bug in this worker", peer)
        finally:
            self._door.leave(sock)

    def _run(self, stream: Stream, peer: str, greeted: Callable[[], None]) -> None:
        Session(stream, self._compute, self._budget, peer, self._options.transcript, self._base).run(greeted)

    def _context(self) -> identity.Context:
        return identity.load(self._options.identity, self._options.peers, server=True)


def _plain(sock: socket.socket) -> SocketStream:
    return SocketStream(sock, descriptors=sock.family == socket.AF_UNIX)


def _compute(options: Options) -> Compute:
    if options.null:
        log.warning("THE NULL WORKER: it computes nothing, its answers mean nothing; for benchmarks only")
        return NullCompute()
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise SettingsError(f"device {options.device!r} is not understood; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f"device {options.device!r} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"there is no device {options.device!r} here; CUDA devices: {torch.cuda.device_count()}")
    compute = TorchCompute(device)
    if options.insecure_lie:
        log.warning("A LYING WORKER: some answers are wrong on purpose; for tests only")
        return LyingCompute(compute, options.insecure_lie)
    return compute


def _memory(compute: Compute) -> int:
    """Default limit: most of what the device has."""
    if isinstance(compute, TorchCompute) and not compute.on_host:
        return int(torch.cuda.get_device_properties(compute.device.torch).total_memory * 0.9)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.8)


def _listen_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise OSError(0, "another worker listens there")
            path.unlink()  # left by a worker that was killed
        previous = os.umask(0o177)  # the socket is for this user only
        try:
            listener.bind(str(path))
        finally:
            os.umask(previous)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise WorkerFailedError(f"cannot listen on unix:{path}: {error.strerror or error}") from error
    return listener

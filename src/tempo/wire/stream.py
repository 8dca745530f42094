"""Byte streams that two threads may use at once, one reading and one writing: plain sockets and TLS."""

from __future__ import annotations

import array
import os
import select
import socket
import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

CHUNK = 1 << 20
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))


class Stream(ABC):
    """A connected, non-blocking socket: try first, wait only when told to.

    ``timeout`` bounds each wait for the other end, in seconds; None waits for ever.
    """

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._owner = os.getpid()
        self.timeout = timeout

    @abstractmethod
    def read_some(self, view: memoryview) -> int:
        """Read at least one byte into ``view``; 0 means that the other end closed."""

    @abstractmethod
    def _write_some(self, buffers: list[memoryview], fd: int | None) -> int: ...

    @final
    def read(self, view: memoryview) -> None:
        """Fill ``view``.

        Raises:
            EOFError: The other end closed before.
            TimeoutError: Nothing came for ``timeout`` seconds.
        """
        done = 0
        while done < len(view):
            count = self.read_some(view[done : done + CHUNK])
            if count == 0:
                raise EOFError("the other end closed the connection in the middle of a frame")
            done += count

    @final
    def write(self, buffers: Sequence[memoryview], fd: int | None = None) -> None:
        """Write all ``buffers``; ``fd`` travels with the first byte (Unix sockets)."""
        queue = [buffer for buffer in buffers if len(buffer)]
        while queue:
            count = self._write_some(queue, fd)
            fd = None
            while queue and count >= len(queue[0]):
                count -= len(queue.pop(0))
            if count:
                queue[0] = queue[0][count:]

    @final
    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._sock, events)
        if not poll.poll(None if self.timeout is None else max(1, int(self.timeout * 1000))):
            raise TimeoutError(f"the other end was silent for {self.timeout:g} s")

    @final
    def shutdown(self) -> None:
        """End the connection and wake whoever waits on it. Does nothing in a forked child: it is the parent's."""
        if os.getpid() == self._owner:
            try:
                # On the plain socket: SSLSocket.shutdown would drop the TLS state that another thread may be using.
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
            except OSError:
                return  # already gone

    @final
    def close(self) -> None:
        """Shut down and free the descriptor, when no thread uses the stream any more."""
        self.shutdown()
        self._sock.close()


@final
class SocketStream(Stream):
    """A plain TCP or Unix socket."""

    def __init__(self, sock: socket.socket, timeout: float | None = None) -> None:
        super().__init__(sock, timeout)
        _tune(sock)
        self.is_unix = sock.family == socket.AF_UNIX
        self.descriptors: list[int] = []

    def read_some(self, view: memoryview) -> int:
        """As in `Stream`."""
        while True:
            try:
                return self._sock.recv_into(view)
            except BlockingIOError:
                self._wait(select.POLLIN)

    def read_some_with_descriptors(self, view: memoryview) -> int:
        """As `read_some`; descriptors that came along are appended to ``descriptors``."""
        while True:
            try:
                count, extras, _, _ = self._sock.recvmsg_into([view], socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            for level, kind, data in extras:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds = array.array("i")
                    fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                    self.descriptors.extend(fds)
            return count

    def _write_some(self, buffers: list[memoryview], fd: int | None) -> int:
        extras = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        while True:
            try:
                return self._sock.sendmsg(buffers, extras)
            except BlockingIOError:
                self._wait(select.POLLOUT)


@final
class TLSStream(Stream):
    """A TLS socket after its handshake.

    An SSL object must not be used by two threads at once, so a lock guards each single call; no call blocks, and
    nobody waits while holding the lock.
    """

    def __init__(self, sock: ssl.SSLSocket, timeout: float | None = None) -> None:
        super().__init__(sock, timeout)
        _tune(sock)
        self._tls = sock
        self._lock = threading.Lock()

    def read_some(self, view: memoryview) -> int:
        """As in `Stream`; at most one TLS record at a time."""
        while True:
            try:
                with self._lock:
                    return self._tls.recv_into(view)
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            self._wait(events)

    def _write_some(self, buffers: list[memoryview], fd: int | None) -> int:
        view = buffers[0][:CHUNK]
        while True:
            try:
                with self._lock:
                    return self._tls.send(view)
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except ssl.SSLWantReadError:
                events = select.POLLIN
            self._wait(events)


def _tune(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # notice a host that vanished
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)

"""Byte streams that two threads may use at once, one reading and one writing: plain sockets and TLS."""

from __future__ import annotations

import array
import os
import select
import socket
import ssl
import struct
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import final

CHUNK = 1 << 20
_DESCRIPTORS = 16
"""Most file descriptors taken from one read."""
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))


class Stream(ABC):
    """A connected socket. Takes ownership of it.

    Attributes:
        descriptors: File descriptors that came, in order.
        received: Bytes read so far.
    """

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        self._sock = sock
        self._owner = os.getpid()
        self.descriptors: deque[int] = deque()
        self.received = 0
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # notice a host that vanished
            for option, value in _KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self.set_timeout(timeout)

    @abstractmethod
    def set_timeout(self, timeout: float | None, sending: float | None = None) -> None:
        """Bound each wait for the other end, in seconds; None waits for ever. ``sending``: another bound for that."""

    @abstractmethod
    def read_some(self, view: memoryview) -> int:
        """Read at least one byte into ``view``; 0 means that the other end closed."""

    @abstractmethod
    def _write_some(self, buffers: list[memoryview], descriptor: int | None) -> int: ...

    @final
    def read(self, view: memoryview) -> None:
        """Fill ``view``.

        Raises:
            EOFError: The other end closed before.
            TimeoutError: Nothing came for as long as the timeout.
        """
        done = 0
        while done < len(view):
            count = self.read_some(view[done : done + CHUNK])
            if count == 0:
                raise EOFError("the other end closed the connection in the middle of it")
            done += count
            self.received += count

    @final
    def write(self, buffers: Sequence[memoryview], descriptor: int | None = None) -> None:
        """Write all ``buffers``; a file ``descriptor`` travels with the first byte (Unix sockets)."""
        queue = [buffer for buffer in buffers if len(buffer)]
        while queue:
            count = self._write_some(queue, descriptor)
            descriptor = None
            while queue and count >= len(queue[0]):
                count -= len(queue.pop(0))
            if count:
                queue[0] = queue[0][count:]

    @final
    def shutdown(self) -> None:
        """End the connection and wake whoever waits on it. Does nothing in a forked child: it is the parent's."""
        if os.getpid() == self._owner:
            try:
                # The plain socket's: SSLSocket.shutdown would drop the TLS state that another thread may be using.
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
    """A plain TCP or Unix socket, blocking."""

    def __init__(self, sock: socket.socket, timeout: float | None = None, *, descriptors: bool = False) -> None:
        sock.setblocking(True)
        super().__init__(sock, timeout)
        self.is_unix = sock.family == socket.AF_UNIX
        self._accepts_descriptors = descriptors

    def set_timeout(self, timeout: float | None, sending: float | None = None) -> None:
        """As in `Stream`: the kernel's timeouts, since Python's would cost a poll before each call."""
        for option, bound in ((socket.SO_RCVTIMEO, timeout), (socket.SO_SNDTIMEO, sending or timeout)):
            seconds = bound or 0.0
            self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6)))

    def read_some(self, view: memoryview) -> int:
        """As in `Stream`; file descriptors that came along are appended to ``descriptors`` if welcome."""
        try:
            if not self._accepts_descriptors:
                return self._sock.recv_into(view)
            count, extras, _, _ = self._sock.recvmsg_into(
                [view], socket.CMSG_SPACE(_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            raise TimeoutError("the other end was silent for too long") from None
        for level, kind, data in extras:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(data[: len(data) - len(data) % received.itemsize])
                self.descriptors.extend(received)
        return count

    def _write_some(self, buffers: list[memoryview], descriptor: int | None) -> int:
        extras = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        try:
            return self._sock.sendmsg(buffers, extras)
        except BlockingIOError:
            raise TimeoutError("the other end did not read for too long") from None


@final
class TLSStream(Stream):
    """A TLS socket after its handshake, non-blocking: try first, wait only when told to.

    An SSL object must not be used by two threads at once, so a lock guards each single call; no call blocks, and
    nobody waits while holding the lock.
    """

    def __init__(self, sock: ssl.SSLSocket, timeout: float | None = None) -> None:
        sock.setblocking(False)
        super().__init__(sock, timeout)
        self._tls = sock
        self._lock = threading.Lock()

    def set_timeout(self, timeout: float | None, sending: float | None = None) -> None:
        """As in `Stream`."""
        self._receiving, self._sending = (
            None if bound is None else max(1, int(bound * 1000)) for bound in (timeout, sending or timeout)
        )

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
            self._wait(events, self._receiving)

    def _write_some(self, buffers: list[memoryview], descriptor: int | None) -> int:
        while True:
            try:
                with self._lock:
                    return self._tls.send(buffers[0][:CHUNK])
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except ssl.SSLWantReadError:
                events = select.POLLIN
            self._wait(events, self._sending)

    def _wait(self, events: int, milliseconds: int | None) -> None:
        poll = select.poll()
        poll.register(self._sock, events)
        if not poll.poll(milliseconds):
            raise TimeoutError("the other end was silent for too long")

"""Byte streams that two threads may use at once, one reading and one writing. Sealed ones: `tempo.wire.sealed`."""

from __future__ import annotations

import array
import os
import socket
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import final

CHUNK = 1 << 20
_DESCRIPTORS = 16
"""Most file descriptors taken from one read."""
_SILENT = "the other end was silent for too long"
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))


class Stream(ABC):
    """A connected socket, blocking. Takes ownership of it.

    Attributes:
        descriptors: File descriptors that came, in order.
        received: Bytes that came out of the socket so far.
    """

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        sock.setblocking(True)
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

    @final
    def set_timeout(self, timeout: float | None, sending: float | None = None) -> None:
        """Bound each wait for the other end, in seconds; None waits for ever. ``sending``: another bound for that."""
        # The kernel's timeouts, since Python's would cost a poll before each call.
        for option, bound in ((socket.SO_RCVTIMEO, timeout), (socket.SO_SNDTIMEO, sending or timeout)):
            seconds = bound or 0.0
            self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6)))

    @abstractmethod
    def read_some(self, view: memoryview) -> int:
        """Read at least one byte into ``view``; 0 means that the other end closed."""

    @abstractmethod
    def _write_some(self, buffers: list[memoryview], descriptor: int | None) -> int: ...

    @final
    def _receive(self, view: memoryview) -> int:
        """At least one byte out of the socket; 0 if the other end closed."""
        try:
            count = self._sock.recv_into(view)
        except BlockingIOError:
            raise TimeoutError(_SILENT) from None
        self.received += count
        return count

    @final
    def _send(self, buffers: Sequence[memoryview], descriptor: int | None = None) -> int:
        """At least one byte into the socket."""
        extras = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        try:
            return self._sock.sendmsg(buffers, extras)
        except BlockingIOError:
            raise TimeoutError("the other end did not read for too long") from None

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

    @final
    def write(self, buffers: Sequence[memoryview], descriptor: int | None = None) -> None:
        """Write all ``buffers``; a file ``descriptor`` travels with the first byte (Unix sockets)."""
        queue = [buffer for buffer in buffers if buffer.nbytes]
        while queue:
            count = self._write_some(queue, descriptor)
            descriptor = None
            while queue and count >= queue[0].nbytes:
                count -= queue.pop(0).nbytes
            if count:
                queue[0] = queue[0][count:]

    @final
    def shutdown(self) -> None:
        """End the connection and wake whoever waits on it. Does nothing in a forked child: it is the parent's."""
        if os.getpid() == self._owner:
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
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

    def __init__(self, sock: socket.socket, timeout: float | None = None, *, descriptors: bool = False) -> None:
        super().__init__(sock, timeout)
        self.is_unix = sock.family == socket.AF_UNIX
        self._accepts_descriptors = descriptors

    def read_some(self, view: memoryview) -> int:
        """As in `Stream`; file descriptors that came along are appended to ``descriptors`` if welcome."""
        if not self._accepts_descriptors:
            return self._receive(view)
        try:
            count, extras, _, _ = self._sock.recvmsg_into(
                [view], socket.CMSG_SPACE(_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            raise TimeoutError(_SILENT) from None
        self.received += count
        for level, kind, data in extras:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(data[: len(data) - len(data) % received.itemsize])
                self.descriptors.extend(received)
        return count

    def _write_some(self, buffers: list[memoryview], descriptor: int | None) -> int:
        return self._send(buffers, descriptor)

"""Who is let in: bounds on connections, and on those that have not said who they are."""

from __future__ import annotations

import socket
import threading
from typing import Final, final

CONNECTION_LIMIT: Final = 256
GREETING_LIMIT: Final = 64


@final
class Door:
    """Counts connections. A flood of strangers costs at most `GREETING_LIMIT` places, and none of who is in already."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._greeting: dict[socket.socket, socket.socket] = {}  # the oldest first, each with a duplicate of our own

    def enter(self, sock: socket.socket) -> bool:
        """Let a connection in, unless there are too many. Hangs up on the oldest that still owes its hello, if need be.

        Raises:
            OSError: The process has too many open files.
        """
        with self._lock:
            if self._count >= CONNECTION_LIMIT:
                return False
            self._greeting[sock] = sock.dup()  # TLS takes the original's descriptor away from it
            self._count += 1
            if len(self._greeting) > GREETING_LIMIT:
                with self._greeting.pop(next(iter(self._greeting))) as oldest:
                    _hang_up(oldest)
            return True

    @property
    def crowded(self) -> bool:
        """Whether the next to come in would show another one out."""
        return len(self._greeting) >= GREETING_LIMIT

    def greeted(self, sock: socket.socket) -> None:
        """The connection said hello: it may stay."""
        with self._lock:
            if duplicate := self._greeting.pop(sock, None):
                duplicate.close()

    def leave(self, sock: socket.socket) -> None:
        """The connection has ended."""
        self.greeted(sock)
        with self._lock:
            self._count -= 1


def _hang_up(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)  # wakes its thread, which closes it
    except OSError:
        return  # it has gone by itself

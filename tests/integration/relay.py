"""A relay between two ends of a connection that stops forwarding when it is told to, and closes nothing."""

from __future__ import annotations

import contextlib
import socket
import threading

WAYS = ("there", "back", "both ways")


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of one connection over loopback: nothing is shared but bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    return ours, theirs


class Relay:
    """Forwards between ``trusted`` and ``worker``, the far ends of which are used as if they were one connection.

    Takes both sockets over.
    """

    def __init__(self, trusted: socket.socket, worker: socket.socket) -> None:
        self._ends = trusted, worker
        self._over = threading.Event()
        self._cut = {way: threading.Event() for way in WAYS[:2]}
        self._left: dict[str, int] = {}
        pairs = {"there": (trusted, worker), "back": (worker, trusted)}
        self._threads = [threading.Thread(target=self._pump, args=(way, *pair)) for way, pair in pairs.items()]
        for thread in self._threads:
            thread.start()

    def cut(self, way: str) -> None:
        """From now on nothing arrives that way, not even that the other end hung up."""
        for name in WAYS[:2] if way == "both ways" else (way,):
            self._cut[name].set()

    def cut_after(self, way: str, count: int) -> None:
        """Let so many more bytes through."""
        self._left[way] = count

    def close(self) -> None:
        """Hang up on both ends."""
        self._over.set()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()

    def _pump(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self._cut[way].is_set():
                    break
                if way in self._left:
                    data = data[: self._left[way]]
                    self._left[way] -= len(data)
                    if not self._left[way]:
                        self._cut[way].set()
                sink.sendall(data)
        if self._cut[way].is_set():
            self._over.wait()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

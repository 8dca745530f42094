"""Clients that mean a worker no good, each on a plain TCP connection, until they are told to stop."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count

from tempo.wire.frame import encode
from tempo.wire.messages import PROTOCOL, Forget, Forward, Hello, Linear, Probe, Store, TensorRef

SESSION = "feedfeedfeedfeed"
HELLO = encode(Hello(PROTOCOL, "hostile", SESSION))
GIB = 1 << 30

Where = tuple[str, int]
Client = Callable[[Where, threading.Event], None]
"""What it does to the worker there, until the event is set or the worker hangs up."""


@contextmanager
def connected(where: Where, greet: bool = True) -> Iterator[socket.socket]:
    """A connection, which has said hello; it ends when the worker hangs up."""
    with socket.create_connection(where, 20) as sock:
        sock.settimeout(0.2)
        if greet:
            sock.sendall(HELLO)
        try:
            yield sock
        except (ConnectionError, EOFError):
            return


def send(sock: socket.socket, data: bytes, stop: threading.Event) -> None:
    """All of ``data``, however slowly the worker takes it."""
    view = memoryview(data)
    while view and not stop.is_set():
        try:
            view = view[sock.send(view) :]
        except TimeoutError:
            continue


def swallow(sock: socket.socket, stop: threading.Event) -> None:
    """Read whatever comes, and drop it."""
    buffer = bytearray(1 << 20)
    while not stop.is_set():
        try:
            if not sock.recv_into(buffer):
                return
        except TimeoutError:
            continue
        except OSError:
            return


def linger(sock: socket.socket, stop: threading.Event) -> None:
    """Until the worker hangs up, or the end; reads nothing."""
    while not stop.wait(0.1):
        sock.send(b"", socket.MSG_DONTWAIT)


def matrix(name: str, rows: int, columns: int) -> TensorRef:
    return TensorRef(name, "float32", (rows, columns))


def store(number: int, rows: int, columns: int) -> Store:
    return Store(id=number, step=0, layer=0, weight=1, tensors=(matrix("w", rows, columns),))


def forward(number: int, rows: int, width: int) -> Forward:
    """A product of rows × width numbers by a stored width × width matrix."""
    x, y = matrix("x", rows, width), matrix("y", rows, width)
    return Forward(
        id=number, step=0, layer=0, weight=1, operand=0, product=Linear(), tensors=(x,), wants=(y,)
    )  # fmt: skip


def nobody(where: Where, stop: threading.Event) -> None:
    """Does nothing at all: what is measured beside it is noise."""
    stop.wait()


def garbage(where: Where, stop: threading.Event) -> None:
    """Random bytes, again and again."""
    while not stop.is_set():
        with connected(where, greet=False) as sock:
            send(sock, os.urandom(4096), stop)
            swallow(sock, stop)


def silence(where: Where, stop: threading.Event) -> None:
    """Many connections that never say a word."""
    with ExitStack() as stack:
        socks = [stack.enter_context(connected(where, greet=False)) for _ in range(32)]
        linger(socks[0], stop)


def half_a_frame(where: Where, stop: threading.Event) -> None:
    """A request that never ends."""
    with connected(where) as sock:
        send(sock, encode(store(1, 1024, 1024)) + bytes(1 << 20), stop)
        linger(sock, stop)


def huge_frame(where: Where, stop: threading.Event) -> None:
    """One tensor of more than the worker's memory, its bytes sent for ever."""
    with connected(where) as sock:
        send(sock, encode(store(1, 1 << 19, 1 << 19)), stop)
        zeros = bytes(1 << 20)
        while not stop.is_set():
            send(sock, zeros, stop)


def connections(where: Where, stop: threading.Event) -> None:
    """New connections as fast as they can be made, each hung up at once."""
    while not stop.is_set():
        try:
            with connected(where, greet=False):
                continue
        except OSError:
            continue


def never_reads(where: Where, stop: threading.Event) -> None:
    """Asks for large answers, and reads none of them."""
    with connected(where) as sock:
        for number in count(1):
            if stop.is_set():
                return
            wants = (TensorRef("y", "uint8", (8 << 20,)),)
            send(sock, encode(Probe(id=number, size=0, wants=wants)), stop)


def asks_too_much(where: Where, stop: threading.Event) -> None:
    """Wants answers larger than the memory of the worker, as fast as it can ask."""
    wants = (TensorRef("y", "uint8", (64 * GIB,)),)
    flood(where, stop, lambda number: encode(Probe(id=number, size=0, wants=wants)))


def empty_requests(where: Where, stop: threading.Event) -> None:
    """Requests for nothing, as fast as it can."""
    flood(where, stop, lambda number: encode(Probe(id=number, size=0)))


def notices(where: Where, stop: threading.Event) -> None:
    """Messages without an answer, as fast as it can."""
    flood(where, stop, lambda number: encode(Forget((number,))))


def products(where: Where, stop: threading.Event, rows: int = 256, width: int = 512) -> None:
    """Requests to multiply, as fast as it can."""
    x = bytes(4 * rows * width)
    first = encode(store(1, width, width)) + bytes(4 * width * width)
    flood(where, stop, lambda number: (first if number == 1 else b"") + encode(forward(number + 1, rows, width)) + x)


def large_products(where: Where, stop: threading.Event) -> None:
    """Requests to multiply, each as much work as many of an honest client's."""
    products(where, stop, 4096, 1024)


def large_probes(where: Where, stop: threading.Event) -> None:
    """Probes of the largest size."""
    flood(where, stop, lambda number: encode(Probe(id=number, size=16384)))


def flood(where: Where, stop: threading.Event, make: Callable[[int], bytes]) -> None:
    """Requests as fast as the worker takes them, its answers read."""
    with connected(where) as sock:
        reader = threading.Thread(target=swallow, args=(sock, stop))
        reader.start()
        try:
            batch = 1 if len(make(2)) > 10_000 else 64
            for number in count(1, batch):
                if stop.is_set():
                    return
                send(sock, b"".join(map(make, range(number, number + batch))), stop)
        finally:
            reader.join()


CLIENTS: dict[str, Client] = {
    client.__name__.replace("_", " "): client
    for client in (
        nobody, garbage, silence, half_a_frame, huge_frame, connections, never_reads, asks_too_much, empty_requests, notices,
        products, large_products, large_probes,
    )
}  # fmt: skip

"""What follows TLS, against whoever holds the network: everything arrives as it was sent, or the connection is over."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo.errors import ProtocolError
from tempo.wire import identity, sealed
from tempo.wire.channel import Channel
from tempo.wire.frame import TO_WORKER
from tempo.wire.messages import Probe, TensorRef
from tempo.wire.sealed import CHUNK, Chain, SealedStream, leave_tls
from tempo.wire.stream import Stream

Chunks = list[bytes]


@dataclass
class Connection:
    """Client and worker, and between them an adversary who has both sockets."""

    client: SealedStream
    worker: SealedStream
    near: socket.socket
    far: socket.socket

    def take(self, source: socket.socket) -> Chunks:
        """All chunks that were sent so far."""
        chunks = []
        source.setblocking(False)
        try:
            while True:
                header = source.recv(4)
                left = struct.unpack("<I", header)[0] + 16
                body = b""
                while len(body) < left:
                    body += source.recv(left - len(body))
                chunks.append(header + body)
        except BlockingIOError:
            return chunks

    def sent(self, *messages: bytes) -> Chunks:
        """The chunks of messages from the client, each in one of its own."""
        for message in messages:
            self.client.write([memoryview(message)])
        return self.take(self.near)

    def deliver(self, data: bytes) -> None:
        """Let the worker have ``data``, and nothing after it."""
        self.far.setblocking(True)
        self.far.sendall(data)
        self.far.shutdown(socket.SHUT_WR)


@pytest.fixture
def connect() -> Iterator[Callable[[], Connection]]:
    with ExitStack() as stack:

        def make() -> Connection:
            (ours, near), (far, theirs) = socket.socketpair(), socket.socketpair()
            secrets = os.urandom(32), os.urandom(32)
            client = SealedStream(ours, *map(Chain, secrets), timeout=5)
            worker = SealedStream(theirs, *map(Chain, reversed(secrets)), timeout=5)
            for stream in client, worker:
                stack.callback(stream.close)
            for sock in near, far:
                stack.callback(sock.close)
            return Connection(client, worker, near, far)

        yield make


def read(stream: Stream, count: int) -> bytes:
    data = bytearray(count)
    stream.read(memoryview(data))
    return bytes(data)


MESSAGES = b"first of all", b"second, not last", b"the third of three"


def flip(position: int) -> Callable[[Chunks, Connection, Connection], Chunks]:
    def flipped(chunks: Chunks, _: Connection, __: Connection) -> Chunks:
        first = bytearray(chunks[0])
        first[position] ^= 1
        return [bytes(first), *chunks[1:]]

    return flipped


def spliced(chunks: Chunks, _: Connection, other: Connection) -> Chunks:
    """The first chunk of another connection between the same two, of the same content."""
    return [*other.sent(MESSAGES[0]), *chunks[1:]]


def reflected(_: Chunks, connection: Connection, __: Connection) -> Chunks:
    """The worker's own first chunk, sent back to it."""
    connection.worker.write([memoryview(MESSAGES[0])])
    return connection.take(connection.far)


def joined(chunks: Chunks, _: Connection, __: Connection) -> Chunks:
    """One chunk that claims the length of two."""
    (length,) = struct.unpack_from("<I", chunks[0])
    return [struct.pack("<I", length + len(chunks[1])) + chunks[0][4:], *chunks[1:]]


ATTACKS: dict[str, tuple[int, Callable[[Chunks, Connection, Connection], Chunks]]] = {
    # how many messages arrive before the worker notices, and what is done to the chunks
    "length flipped": (0, flip(0)),
    "length enlarged": (0, flip(3)),
    "content flipped": (0, flip(4)),
    "tag flipped": (0, flip(-1)),
    "first dropped": (0, lambda chunks, *_: chunks[1:]),
    "second dropped": (1, lambda chunks, *_: [chunks[0], chunks[2]]),
    "reordered": (1, lambda chunks, *_: [chunks[0], chunks[2], chunks[1]]),
    "replayed": (1, lambda chunks, *_: [chunks[0], chunks[0], *chunks[1:]]),
    "cut short": (2, lambda chunks, *_: [*chunks[:2], chunks[2][:-1]]),
    "cut in a length": (2, lambda chunks, *_: [*chunks[:2], chunks[2][:3]]),
    "invented": (0, lambda *_: [struct.pack("<I", 12) + bytes(28)]),
    "empty": (0, lambda *_: [bytes(20)]),
    "joined": (0, joined),
    "spliced": (0, spliced),
    "reflected": (0, reflected),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_is_done_to_chunks_ends_the_connection(connect: Callable[[], Connection], attack: str) -> None:
    connection, other = connect(), connect()
    arrive, tamper = ATTACKS[attack]
    chunks = connection.sent(*MESSAGES)
    assert len(chunks) == 3
    connection.deliver(b"".join(tamper(chunks, connection, other)))
    for message in MESSAGES[:arrive]:
        assert read(connection.worker, len(message)) == message
    with pytest.raises(ProtocolError, match="chunk"):
        read(connection.worker, len(MESSAGES[arrive]))
    with pytest.raises(ProtocolError, match="over"):  # not even what is good after it
        read(connection.worker, 1)


def test_untouched_chunks_arrive(connect: Callable[[], Connection]) -> None:
    """The control of the test above."""
    connection = connect()
    connection.deliver(b"".join(connection.sent(*MESSAGES)))
    for message in MESSAGES:
        assert read(connection.worker, len(message)) == message
    with pytest.raises(EOFError):
        read(connection.worker, 1)


def test_a_frame_is_not_acted_upon_before_its_tag_has_passed(connect: Callable[[], Connection]) -> None:
    """The header of a request opens; its tensor does not: the request never comes out of the channel."""
    connection = connect()
    content = os.urandom(2 * CHUNK)
    probe = Probe(id=1, size=0, tensors=(TensorRef("x", "uint8", (len(content),)),))
    thread = threading.Thread(
        target=Channel(connection.client, TO_WORKER, None).send, args=(probe, [memoryview(content)])
    )
    thread.start()
    raw = b""
    while len(raw) < len(content):
        raw += connection.near.recv(1 << 20)
    thread.join()
    thread = threading.Thread(target=connection.deliver, args=(raw[:-1] + bytes([raw[-1] ^ 1]),))
    thread.start()
    placed = bytearray(len(content))
    with pytest.raises(ProtocolError, match="was not sealed as it came"):
        Channel(connection.worker, TO_WORKER, None).receive(lambda _: [memoryview(placed)])
    thread.join()
    assert placed[:CHUNK] == content[:CHUNK]  # of a chunk that did open


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 700, 8 << 10, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]), max_size=5),
    cuts=st.lists(st.integers(5000, 2 * CHUNK), min_size=1, max_size=8),
)
def test_bytes_arrive_however_they_are_cut(sizes: list[int], cuts: list[int]) -> None:
    ours, theirs = socket.socketpair()
    sender, receiver = (
        SealedStream(ours, Chain(bytes(32)), Chain(b"1" * 32), timeout=30),
        SealedStream(theirs, Chain(b"1" * 32), Chain(bytes(32)), timeout=30),
    )
    buffers = [memoryview(os.urandom(size)) for size in sizes]
    thread = threading.Thread(target=lambda: (sender.write(buffers), sender.close()))
    thread.start()
    data, position = bytearray(), 0
    whole = b"".join(buffers)
    while len(data) < len(whole):
        data += read(receiver, min(cuts[position % len(cuts)], len(whole) - len(data)))
        position += 1
    thread.join()
    assert data == whole
    assert receiver.read_some(memoryview(bytearray(1))) == 0
    receiver.close()


def test_keys_are_replaced_and_no_nonce_comes_twice(
    connect: Callable[[], Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "CHUNKS_PER_KEY", 2)
    connection = connect()
    chunks = connection.sent(*[b"the same"] * 7)
    assert len(set(chunks)) == 7
    connection.deliver(b"".join(chunks))
    assert read(connection.worker, 7 * 8) == 7 * b"the same"
    one, other = Chain(bytes(32)), Chain(bytes(32))
    used = [one.next() for _ in range(6)]
    assert len({nonce for _, nonce in used}) == 6
    assert [used[number][0] is used[number + 1][0] for number in range(5)] == [True, False, True, False, True]
    assert other.next()[0].encrypt(bytes(12), b"x", None) == used[0][0].encrypt(bytes(12), b"x", None)
    assert used[2][0].encrypt(bytes(12), b"x", None) != used[0][0].encrypt(bytes(12), b"x", None)


# --- the exchange inside TLS ---


def handshake(folder: Path, worker: Callable[..., object], client: Callable[..., object]) -> list[object]:
    """What the two sides' functions make of the two ends of a TLS connection; exceptions instead of raising."""
    folder.mkdir(exist_ok=True)
    contexts = {}
    for name, peer in ("worker", "client"), ("client", "worker"):
        if not (folder / f"{name}.key").exists():
            identity.generate(folder, name)
        if not (folder / f"{peer}.key").exists():
            identity.generate(folder, peer)
        contexts[name] = identity.load(folder / f"{name}.key", folder / f"{peer}.pub", server=name == "worker")
    here, there = socket.socketpair()
    results: list[object] = [None, None]

    def run(index: int, prepare: Callable[..., object], sock: socket.socket, name: str) -> None:
        try:
            tls = (identity.accept if name == "worker" else identity.connect)(sock, contexts[name], 10)
            results[index] = prepare(tls, server=name == "worker")
        except (ProtocolError, OSError) as error:
            results[index] = error

    thread = threading.Thread(target=run, args=(0, worker, there, "worker"))
    thread.start()
    run(1, client, here, "client")
    thread.join()
    return results


def test_both_directions_work_after_tls_and_no_two_connections_share_a_key(tmp_path: Path) -> None:
    firsts = []
    for _ in range(2):
        worker, client = handshake(tmp_path / "keys", leave_tls, leave_tls)
        assert isinstance(worker, SealedStream)
        assert isinstance(client, SealedStream)
        for sender, receiver in (worker, client), (client, worker):
            sender.write([memoryview(b"hello")])
            raw = receiver._sock.recv(25, socket.MSG_PEEK)
            firsts.append(raw)
            assert b"hello" not in raw
            assert read(receiver, 5) == b"hello"
        worker.close()
        client.close()
    assert len(set(firsts)) == 4


def test_another_version_inside_tls_is_known_for_what_it_is(tmp_path: Path) -> None:
    def other_version(tls, server: bool) -> None:
        tls.sendall(b"TMP1" + bytes(64))
        tls.close()

    worker, _ = handshake(tmp_path, leave_tls, other_version)
    assert isinstance(worker, ProtocolError)
    assert "install the same version" in str(worker)


def test_an_end_that_hangs_up_inside_tls_is_no_key(tmp_path: Path) -> None:
    worker, _ = handshake(tmp_path, leave_tls, lambda tls, server: tls.close())
    assert isinstance(worker, OSError)

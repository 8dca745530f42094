"""A worker facing bad frames: that connection ends, with a log line; every other session goes on."""

from __future__ import annotations

import array
import fcntl
import logging
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import msgpack
from msgspec.structs import replace

from tempo.engine.link import ACKNOWLEDGED, Link
from tempo.errors import IdentityError, WorkerOutOfMemoryError, WorkerRefusedError
from tempo.settings import Settings
from tempo.wire import identity
from tempo.wire.frame import MAGIC, PREFIX, encode
from tempo.wire.messages import (
    PROTOCOL,
    Backward,
    Failure,
    Fetch,
    Forget,
    Forward,
    Hello,
    Linear,
    Lion,
    Probe,
    Result,
    Segment,
    Store,
    TensorRef,
    ToTrusted,
    ToWorker,
    Update,
)

from .conftest import SESSION, InProcess

Start = Callable[..., InProcess]
HELLO = Hello(PROTOCOL, "test", SESSION)
W = TensorRef("w", "float32", (4, 4))
STORE = Store(id=1, step=0, layer=0, weight=1, tensors=(W,))
FORWARD = Forward(
    id=2, step=0, layer=0, weight=1, operand=1, product=Linear(), tensors=(replace(W, name="x"),),
    wants=(replace(W, name="y"),),
)  # fmt: skip


def frame(message: ToWorker) -> bytes:
    return encode(message) + bytes(sum(64 for _ in getattr(message, "tensors", ())))


def drain(sock: socket.socket, received: bytes = b"") -> list[ToTrusted]:
    """Everything until the worker hangs up."""
    sock.settimeout(20)
    data = bytearray(received)
    try:
        while chunk := sock.recv(1 << 16):
            data += chunk
    except ConnectionResetError:
        pass  # it closed over bytes that it did not read
    messages = []
    while len(data) >= PREFIX.size:
        _, header, payload = PREFIX.unpack(data[: PREFIX.size])
        messages.append(msgpack.decode(data[PREFIX.size : PREFIX.size + header], type=ToTrusted))
        del data[: PREFIX.size + header + payload]
    return messages


def use(link: Link) -> None:
    """The other session still computes."""
    x = torch.randn(2, 4)
    message = Forward(step=0, layer=0, weight=7, operand=0, product=Linear())
    y = link.request(message, {"x": x}, {"y": ((2, 4), torch.float32)})["y"].result()
    assert torch.equal(x, y)
    link.buffers.release(y)


@pytest.fixture(scope="module")
def shared_worker(tmp_path_factory: pytest.TempPathFactory) -> object:
    with ExitStack() as stack:
        worker = InProcess(stack, tmp_path_factory.mktemp("worker"), insecure_no_tls=True, memory_limit="1GiB")
        link = worker.link()
        link.request(Store(step=0, layer=0, weight=7), {"w": torch.eye(4)}, {})[ACKNOWLEDGED].result()
        yield worker, link


def attack(shared_worker: tuple[InProcess, Link], data: bytes, descriptors: tuple[int, ...] = ()) -> list[ToTrusted]:
    worker, link = shared_worker
    with worker.socket() as sock:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            sock.sendmsg([data], rights)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it hung up already
        answers = drain(sock)
    use(link)
    return answers


BAD = {
    "not tempo": b"GET / HTTP/1.1\r\n\r\n",
    "no hello": frame(STORE),
    "two hellos": frame(HELLO) * 2,
    "header too long": frame(HELLO) + PREFIX.pack(MAGIC, 1 << 17, 0) + bytes(1 << 17),
    "payload too long": frame(HELLO) + PREFIX.pack(MAGIC, 10, 1 << 62),
    "payload does not fit": frame(HELLO) + PREFIX.pack(MAGIC, 4, 1 << 40) + b"\x90\x90\x90\x90",
    "an id again": frame(HELLO) + frame(STORE) * 2,
    "ids backwards": frame(HELLO) + frame(FORWARD) + frame(STORE),
    "id zero": frame(HELLO) + frame(replace(STORE, id=0)),
    "truncated prefix": frame(HELLO) + frame(STORE)[:10],
    "truncated header": frame(HELLO) + frame(STORE)[:30],
    "truncated payload": frame(HELLO) + frame(STORE)[:-1],
    "segment without descriptor": frame(HELLO) + frame(Segment(0, 4096)),
    "tensor in no segment": frame(HELLO) + encode(replace(STORE, tensors=(replace(W, segment=0),))),
    "answer instead of request": frame(HELLO) + encode(Forget()).replace(b"forget", b"result"),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_a_bad_frame_ends_its_connection_only(
    shared_worker: tuple[InProcess, Link], data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        attack(shared_worker, data)
    (line,) = [record for record in caplog.records if "connection closed" in record.getMessage()]
    assert len(line.getMessage()) < 500


def test_the_reason_is_told(shared_worker: tuple[InProcess, Link]) -> None:
    answers = attack(shared_worker, frame(HELLO) + frame(STORE) * 2)
    (goodbye,) = [answer for answer in answers if isinstance(answer, Failure)]  # perhaps before the answer that was due
    assert goodbye.id == 0
    assert "request 1 after request 1" in goodbye.message


def memfd(size: int, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (Segment(1, 4096), lambda: memfd(4096)),
        (Segment(0, 8192), lambda: memfd(4096)),
        (Segment(0, 4096), lambda: memfd(4096, fcntl.F_SEAL_GROW)),
        (Segment(0, 4096), lambda: os.open("/dev/null", os.O_RDWR)),
    ],
)
def test_a_bad_segment_ends_its_connection_only(
    shared_worker: tuple[InProcess, Link], message: Segment, make: Callable[[], int]
) -> None:
    fd = make()
    try:
        *_, last = attack(shared_worker, frame(HELLO) + frame(message), (fd,))
    finally:
        os.close(fd)
    assert "segment 0" in last.message or "segment 1" in last.message


def test_an_answer_in_memory_that_only_we_may_write_is_refused(shared_worker: tuple[InProcess, Link]) -> None:
    future_write = 0x10
    fd = memfd(4096, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | future_write)
    shared = [replace(ref, segment=0) for ref in (W, *FORWARD.tensors, *FORWARD.wants)]
    store, forward = replace(STORE, tensors=(shared[0],)), replace(FORWARD, tensors=(shared[1],), wants=(shared[2],))
    data, answers = b"".join(map(encode, (HELLO, Segment(0, 4096), store, forward))), bytearray()
    with shared_worker[0].socket() as sock:
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        os.close(fd)
        sock.settimeout(20)
        while b"which is sealed" not in answers:
            chunk = sock.recv(1 << 16)
            assert chunk, "the worker hung up"
            answers += chunk
    use(shared_worker[1])


def test_uninvited_descriptors_are_closed(shared_worker: tuple[InProcess, Link]) -> None:
    fds = tuple(memfd(4096) for _ in range(8))
    before = len(os.listdir("/proc/self/fd"))
    attack(shared_worker, frame(HELLO) + frame(STORE), fds)
    shared_worker[0].sessions[-1].join()  # the end of the stream is seen before its descriptors are closed
    after = len(os.listdir("/proc/self/fd"))
    for fd in fds:
        os.close(fd)
    assert after <= before


WHERE = {"step": 0, "layer": 0, "weight": 1}
BACKWARD = Backward(**WHERE, id=3, operand=1, product=Linear(), accumulate=True, tensors=(replace(W, name="g"),))
RULE = Lion(lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0)
CONVERSATION = b"".join(
    frame(message)
    for message in (
        HELLO,
        STORE,
        FORWARD,
        BACKWARD,
        Update(**WHERE, id=4, rule=RULE),
        Fetch(**WHERE, id=5, wants=(replace(W, name="exp_avg"),)),
        Forget((1,), (1,), (1,)),
        Probe(id=6, size=8),
    )
)


def test_the_conversation_that_is_mutated_below_is_a_good_one(shared_worker: tuple[InProcess, Link]) -> None:
    data, last = b"", encode(Result(6, 0, ()))[PREFIX.size :].partition(b"nanoseconds")[0]
    with shared_worker[0].socket() as sock:
        sock.settimeout(20)
        sock.sendall(CONVERSATION)
        while last not in data:  # hanging up before would leave requests unanswered
            chunk = sock.recv(1 << 16)
            assert chunk, "the worker hung up"
            data += chunk
        sock.shutdown(socket.SHUT_WR)
        answers = drain(sock, data)
    answers = [answer for answer in answers if isinstance(answer, Result | Failure)]
    assert [type(answer) for answer in answers] == [Result] * 6


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good conversation in which bytes were changed, dropped, repeated or inserted."""
    data = bytearray(CONVERSATION)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        end = at + draw(st.integers(0, 20))
        data[at:end] = draw(st.binary(max_size=20)) or bytes(data[at:end]) * 2
    return bytes(data)


RANDOM_HEADER = st.binary(max_size=100).map(lambda header: PREFIX.pack(MAGIC, len(header), 0) + header)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mutated() | st.lists(RANDOM_HEADER, max_size=3).map(b"".join).map(frame(HELLO).__add__) | st.binary(max_size=300)
)
def test_no_bytes_harm_the_worker(shared_worker: tuple[InProcess, Link], data: bytes) -> None:
    attack(shared_worker, data)


def test_another_protocol_is_refused_with_advice(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempo.engine.link.PROTOCOL", PROTOCOL + 1)
    with pytest.raises(WorkerRefusedError, match="install the same version on both"):
        start().link()


# --- memory ---


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_the_memory_limit_refuses_and_the_session_goes_on(start: Start, transport: str) -> None:
    link = start(memory_limit="1MiB").link(transport)
    small, large = torch.ones(100, 1000), torch.ones(300, 1000)

    def store(number: int, w: torch.Tensor) -> None:
        link.request(Store(step=0, layer=4, weight=number), {"w": w}, {})[ACKNOWLEDGED].result()

    store(1, small)
    store(2, small)
    with pytest.raises(WorkerOutOfMemoryError, match=r"layer 4: out of memory.*--memory-limit"):
        store(3, large)
    with pytest.raises(WorkerOutOfMemoryError):
        store(4, small)
    link.forget(weights=[1])
    store(4, small)
    for _ in range(5):  # nothing adds up
        link.forget(weights=[4])
        store(4, small)


def test_sessions_share_the_limit_and_leave_nothing_behind(start: Start) -> None:
    worker = start(memory_limit="1MiB")
    w, where = torch.ones(200, 1000), {"step": 0, "layer": 0, "weight": 1}
    first, second = worker.link("tcp"), worker.link("shm")
    first.request(Store(**where), {"w": w}, {})[ACKNOWLEDGED].result()
    with pytest.raises(WorkerOutOfMemoryError):
        second.request(Store(**where), {"w": w}, {})[ACKNOWLEDGED].result()
    first.forget(weights=[1])
    first.request(Probe(size=0), {}, {})[ACKNOWLEDGED].result()
    second.request(Store(**where), {"w": w}, {})[ACKNOWLEDGED].result()  # takes what the first keeps in reserve


def test_sessions_do_not_see_one_another(start: Start) -> None:
    worker = start()
    links = [worker.link(), worker.link(session="f" * 16)]
    where = {"step": 0, "layer": 0, "weight": 1}
    for scale, link in enumerate(links, 1):
        link.request(Store(**where), {"w": scale * torch.eye(4)}, {})[ACKNOWLEDGED].result()
    for scale, link in enumerate(links, 1):
        message = Forward(**where, operand=1, product=Linear())
        y = link.request(message, {"x": torch.ones(2, 4)}, {"y": ((2, 4), torch.float32)})["y"].result()
        assert torch.equal(y, scale * torch.ones(2, 4))


# --- TLS ---


def test_a_trusted_side_that_the_worker_does_not_know_is_refused(start: Start, tmp_path: Path) -> None:

    address = start(tls=True).listen()
    mallory, _, _ = identity.generate(tmp_path, "mallory")
    wrong = Settings(identity=str(mallory), peers=str(tmp_path / "worker.pub"))
    with pytest.raises(WorkerRefusedError, match=r"copy .*mallory\.pub into its peers folder"):
        Link.connect(address, settings=wrong, session=SESSION)
    good = Settings(identity=str(tmp_path / "trusted.key"), peers=str(tmp_path / "worker.pub"))
    link = Link.connect(address, settings=good, session=SESSION)  # it still serves those that it knows
    link.close()


def test_a_worker_that_the_trusted_side_does_not_know_is_not_spoken_to(start: Start, tmp_path: Path) -> None:

    address = start(tls=True).listen()
    _, mallory, _ = identity.generate(tmp_path, "mallory")
    settings = Settings(identity=str(tmp_path / "trusted.key"), peers=str(mallory))
    with pytest.raises(IdentityError, match=r"worker 127\.0\.0\.1.*copy its \.pub file"):
        Link.connect(address, settings=settings, session=SESSION)


def test_tls_and_plain_do_not_mix(start: Start, tmp_path: Path) -> None:

    with_tls, without = start(tls=True).listen(), start().listen()
    plain = Settings(insecure_no_tls=True)
    with pytest.raises(WorkerRefusedError, match="TLS"):
        Link.connect(with_tls, settings=plain, session=SESSION)
    keys = Settings(identity=str(tmp_path / "trusted.key"), peers=str(tmp_path / "worker.pub"), connect_timeout=5)
    with pytest.raises(WorkerRefusedError, match="--insecure-no-tls"):
        Link.connect(without, settings=keys, session=SESSION)


def test_a_tcp_worker_without_keys_says_how_to_make_them(start: Start, tmp_path: Path) -> None:

    with pytest.raises(IdentityError, match="tempo keygen"):
        start(insecure_no_tls=False, identity=tmp_path / "none.key").server.listen("127.0.0.1:0")

"""The trusted end of a connection to one worker: requests out, futures back.

Everything that a worker sends is checked against what was asked of it; the first mismatch ends the connection.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Final, NamedTuple, Self, final

import msgspec
import torch
from torch import Tensor

import tempo
from tempo.engine.buffers import Buffers, Placed
from tempo.engine.dial import Dialled, dial
from tempo.engine.geometry import Shape
from tempo.engine.measure import Measurement, measure
from tempo.engine.trace import Exchange
from tempo.errors import (
    ProtocolError,
    WorkerError,
    WorkerFailedError,
    WorkerLacksWeightError,
    WorkerLostError,
    WorkerOutOfMemoryError,
    WorkerRefusedError,
    WorkerUnreachableError,
)
from tempo.settings import Settings
from tempo.wire.address import Address
from tempo.wire.channel import Channel
from tempo.wire.frame import TO_TRUSTED
from tempo.wire.messages import (
    PROTOCOL,
    Alive,
    Failure,
    Forget,
    Hello,
    Probe,
    Request,
    Result,
    Seek,
    Segment,
    Store,
    ToTrusted,
    Welcome,
)
from tempo.wire.shared import Segments
from tempo.wire.stream import SocketStream
from tempo.wire.tensors import raw, size_of

ACKNOWLEDGED: Final = ""
"""Key of the future of a request that wants nothing back."""

_FORGET_BATCH: Final = 2048
_STOP_TIMEOUT: Final = 5.0
_IDS: Final = count(1)  # unique over the links of a process: transcripts of several workers merge in order


@final
class _Want(NamedTuple):
    """An answer that is due: exactly this reference, into this place."""

    answer: Placed
    future: Future[Tensor]


@final
class _Pending(NamedTuple):
    """A request in flight. Who pops a want, or the request itself, is the one to resolve its future."""

    request: Request
    sent: list[Placed]
    wants: dict[str, _Want]
    acknowledged: Future[None] | None
    exchange: Exchange | None


@final
class Link:
    """One worker. `request` may be called from any thread; answers resolve on a thread of the link's own.

    Attributes:
        address: The worker's address.
        welcome: What the worker said of itself (version, device, memory); never trusted.
        unbound: Why the worker may be another operator's, and what to do; empty where it cannot.
        buffers: Where to write what `request` is to send, and to give back what came.
        index: The worker's number in its session.
        last_id: The number of the last request.
        process: The worker's process, where this one started it; it ends with the link.
        bytes_sent: Tensor bytes sent so far, through shared memory or not; ``bytes_received`` likewise.
        worker_nanoseconds: The compute time that the worker claims.
    """

    def __init__(self, dialled: Dialled, address: Address, *, settings: Settings, session: str) -> None:
        stream = dialled.stream
        self.address = address
        self.unbound = dialled.unbound
        self.index = 0
        self.last_id = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        self.worker_nanoseconds = 0
        self._segments = Segments()
        self._channel: Channel[ToTrusted] = Channel(stream, TO_TRUSTED, self._segments.size)
        self._owner = os.getpid()
        self._lock = threading.RLock()  # orders ids, sends and failure
        self._pending: dict[int, _Pending] = {}
        self._forgotten: deque[tuple[str, int]] = deque()
        self._lost: WorkerError | None = None
        try:
            self.welcome = self._greet(session, dialled.hint)
        except BaseException:
            stream.close()
            raise
        stream.set_timeout(settings.stall_timeout, sending=settings.request_timeout)
        self._stall_timeout = settings.stall_timeout
        self._unheard: tuple[int, float] | None = None
        self._shared = isinstance(stream, SocketStream) and stream.is_unix and "shm" in self.welcome.capabilities
        self.buffers = Buffers(self._segments, shared=self._shared, packs=settings.wire_dtype == "int8")
        self._receiver = threading.Thread(target=self._receive_all, name=f"tempo {address}", daemon=True)
        self._receiver.start()

    @classmethod
    def connect(cls, address: Address, *, settings: Settings, session: str) -> Self:
        """Connect to the worker at ``address``.

        Args:
            address: Where it listens.
            settings: Timeouts and TLS.
            session: 16 hexadecimal digits; names the session in transcripts.

        Raises:
            WorkerUnreachableError: Nobody answers there.
            WorkerRefusedError: It does not trust our certificate, or speaks another protocol.
            IdentityError: We have no key pair, or its certificate is not one of its operator's.
        """
        return cls(dial(address, settings), address, settings=settings, session=session)

    @classmethod
    def adopt(cls, sock: socket.socket, address: Address, *, settings: Settings, session: str) -> Self:
        """Speak over a socket that is connected already: a local worker's."""
        dialled = Dialled(SocketStream(sock, settings.connect_timeout))
        return cls(dialled, address, settings=settings, session=session)

    # --- what the engine calls ---

    def request(
        self,
        message: Request,
        tensors: Mapping[str, Tensor],
        wants: Mapping[str, tuple[Shape, torch.dtype]],
        exchange: Exchange | None = None,
    ) -> dict[str, Future[Tensor]] | dict[str, Future[None]]:
        """Send a request and return a future for each wanted tensor.

        Args:
            message: The request; its id and references are filled in here.
            tensors: Operands by name. Those from `Buffers.empty` are used in place and taken over; others copied. Under
                the setting ``wire_dtype="int8"`` those of float32 are packed.
            wants: Shape and dtype of each answer by name.
            exchange: Notes what is sent and what comes, before futures resolve.

        Returns:
            Futures by name, or one under `ACKNOWLEDGED` if nothing is wanted. They fail with a `WorkerError`.
            Their callbacks run on the link's thread.
        """
        sent = [self.buffers.operand(name, tensor) for name, tensor in tensors.items()]
        due = {name: _Want(self.buffers.answer(name, *layout), Future()) for name, layout in wants.items()}
        futures = {name: want.future for name, want in due.items()}
        acknowledged: Future[None] | None = None if due else Future()
        with self._lock:
            self.last_id = next(_IDS)
            message = msgspec.structs.replace(
                message,
                id=self.last_id,
                tensors=tuple(operand.ref for operand in sent),
                wants=tuple(want.answer.ref for want in due.values()),
            )
            self._send(_Pending(message, sent, due, acknowledged, exchange))
        return futures if acknowledged is None else {ACKNOWLEDGED: acknowledged}

    def forget(self, weights: Iterable[int] = (), operands: Iterable[int] = (), gradients: Iterable[int] = ()) -> None:
        """Let the worker drop these, before the next request. Only takes note, so finalizers may call it."""
        for what, numbers in ("weights", weights), ("operands", operands), ("gradients", gradients):
            for number in numbers:
                self._forgotten.append((what, number))

    def measure(self) -> Measurement:
        """Measure the worker and the way to it by probes: well under a second in all."""
        return measure(self)

    def close(self) -> None:
        """End the connection and wait for its thread. In a forked child only the descriptor is freed."""
        if os.getpid() != self._owner:
            self._channel.close()
            return
        stuck = self._lost is not None
        self._lose(WorkerLostError(f"worker {self.address}: the connection was closed"))
        if threading.current_thread() is not self._receiver:
            self._receiver.join()
        self._channel.close()
        self._segments.close()
        self.buffers.close()
        if self.process is not None:
            stop(self.process, 0.0 if stuck else _STOP_TIMEOUT)

    # --- sending ---

    def _send(self, pending: _Pending) -> None:
        message = pending.request
        if self._lost is not None:
            self._fail(pending, self._lost)
            return
        self._pending[message.id] = pending
        size = sum(map(size_of, message.tensors))
        self.bytes_sent += size
        if pending.exchange is not None:
            pending.exchange.size = size
        try:
            self._announce_segments()
            payload = [] if self._shared else [raw(operand.tensor) for operand in pending.sent]
            self._channel.send(message, payload, after=self._take_forgotten())
        except OSError as error:
            self._lose(self._broken(error))

    def _announce_segments(self) -> None:
        for segment in self._segments.drain():
            try:
                self._channel.send(Segment(segment.number, segment.size), descriptor=segment.fd)
            finally:
                os.close(segment.fd)

    def _take_forgotten(self) -> list[Forget]:
        """What may be dropped before the next request."""
        messages, fields = [], ("weights", "operands", "gradients")
        while self._forgotten:
            batch = [self._forgotten.popleft() for _ in range(min(len(self._forgotten), _FORGET_BATCH))]
            messages.append(Forget(**{field: tuple(n for what, n in batch if what == field) for field in fields}))
        return messages

    # --- receiving, on the link's own thread ---

    def _greet(self, session: str, hint: str) -> Welcome:
        who = f"worker {self.address}"
        try:
            self._channel.send(Hello(PROTOCOL, tempo.__version__, session, ("shm",)))
            answer = self._channel.receive(lambda _: None)
        except TimeoutError as error:
            raise WorkerUnreachableError(f"{who} accepted the connection and then said nothing: {error}") from error
        except ProtocolError as error:
            raise WorkerRefusedError(f"{who} does not speak Tempo's protocol: {error}") from error
        except (OSError, EOFError) as error:
            raise WorkerRefusedError(f"{who} ended the connection at once ({error}){hint}") from error
        if isinstance(answer, Failure):
            raise WorkerRefusedError(f"{who} refused: {_printable(answer.message)}")
        if not isinstance(answer, Welcome) or answer.protocol != PROTOCOL:
            raise WorkerRefusedError(f"{who} does not speak protocol {PROTOCOL}: install the same version on both")
        said = {name: _printable(getattr(answer, name)) for name in ("version", "device")}
        return msgspec.structs.replace(answer, **said)

    def _receive_all(self) -> None:
        try:
            while True:
                message = self._channel.receive(self._place)
                if isinstance(message, Result):
                    self._resolve(message)
                elif isinstance(message, Failure):
                    self._report(message)
                elif isinstance(message, Alive):
                    self._heed(message)
        except Exception as error:  # whatever it was, nobody may wait for ever
            self._lose(self._broken(error))

    def _place(self, message: ToTrusted) -> Sequence[memoryview]:
        """Refuse all but an answer that is due, before a byte of it is read."""
        if isinstance(message, Failure | Alive):
            return ()
        if isinstance(message, Welcome):
            raise ProtocolError("a second welcome")
        pending = self._pending.get(message.id)
        if pending is None:
            raise ProtocolError(f"an answer to request {message.id}, which is not in flight")
        if pending.exchange is not None:
            pending.exchange.begins()
        if not message.tensors and pending.acknowledged is not None:
            return ()
        want = pending.wants.get(message.tensors[0].name) if len(message.tensors) == 1 else None
        if want is None or want.answer.ref != message.tensors[0]:
            raise ProtocolError(f"an answer to request {message.id} that is not what was asked for")
        return () if self._shared else (raw(want.answer.tensor),)

    def _resolve(self, message: Result) -> None:
        self.worker_nanoseconds += message.nanoseconds
        pending = self._pending.get(message.id)
        if pending is None:
            return  # the link was closed meanwhile
        want = pending.wants.pop(message.tensors[0].name, None) if message.tensors else None
        if pending.exchange is not None:
            name, size = (want.answer.ref.name, size_of(want.answer.ref)) if want is not None else (ACKNOWLEDGED, 0)
            pending.exchange.arrived(name, message.nanoseconds, size)
        if not pending.wants and self._pending.pop(message.id, None) is not None:
            self.buffers.done_with(pending.sent)
            if pending.acknowledged is not None:
                pending.acknowledged.set_result(None)
        if want is not None:
            self.bytes_received += size_of(want.answer.ref)
            self.buffers.arrived(want.answer)
            want.future.set_result(want.answer.tensor)

    def _heed(self, message: Alive) -> None:
        """A worker that starves while it owes an answer does not hear us: the way there is cut, the way back is not."""
        oldest = min(list(self._pending), default=0)
        if not (message.starved and oldest):
            self._unheard = None
        elif self._unheard is None or self._unheard[0] != oldest:
            self._unheard = oldest, time.monotonic()
        elif time.monotonic() - self._unheard[1] > self._stall_timeout:
            raise TimeoutError(f"it is alive, but nothing of a request reached it for {self._stall_timeout:g} s")

    def _report(self, message: Failure) -> None:
        why = _printable(message.message)
        if message.id == 0:
            raise ProtocolError(f"it closed the connection: {why}")
        pending = self._pending.pop(message.id, None)
        if pending is None:
            raise ProtocolError(f"a failure of request {message.id}, which is not in flight")
        where = f"worker {self.address}"
        if not isinstance(pending.request, Probe | Seek):
            where += f", layer {pending.request.layer}"
        if message.code == "out-of-memory":
            advice = "raise its --memory-limit, use a smaller batch, or add workers"
            self._fail(pending, WorkerOutOfMemoryError(f"{where}: out of memory: {why}; {advice}"))
        else:
            request = pending.request
            asked = isinstance(request, Seek) or (isinstance(request, Store) and request.digests)
            kind = WorkerLacksWeightError if asked and message.code == "unknown-digest" else WorkerFailedError
            self._fail(pending, kind(f"{where}: {message.code}: {why}"))

    # --- endings ---

    def _broken(self, error: Exception) -> WorkerLostError:
        return WorkerLostError(f"worker {self.address}: connection lost: {error}")

    def _lose(self, error: WorkerError) -> None:
        """Fail everything in flight and everything to come."""
        if self._lost is None:
            self._lost = error
        self._channel.stream.shutdown()  # before the lock: it wakes a sender that holds it
        with self._lock:
            while self._pending:
                self._fail(self._pending.popitem()[1], self._lost)

    def _fail(self, pending: _Pending, error: WorkerError) -> None:
        self.buffers.done_with(pending.sent)
        while pending.wants:
            _, want = pending.wants.popitem()
            self.buffers.never_came(want.answer)
            want.future.set_exception(error.bare())
        if pending.acknowledged is not None:
            pending.acknowledged.set_exception(error.bare())


def stop(process: subprocess.Popen[bytes], patience: float = _STOP_TIMEOUT) -> None:
    """Wait for a worker's process, whose connection has ended, to end too; help it if it does not."""
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _printable(text: str) -> str:
    """What a worker says, made safe to show."""
    return "".join(char if char.isprintable() else " " for char in text)[:500]

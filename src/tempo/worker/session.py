"""One connection, one session: a thread that receives and checks, a thread that computes and answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, final

import torch

import tempo
from tempo.errors import ProtocolError
from tempo.wire.channel import Channel
from tempo.wire.frame import TO_WORKER, inline
from tempo.wire.messages import BEAT, PROTOCOL, Alive, Failure, Forget, Hello, Segment, TensorRef, ToWorker, Welcome
from tempo.wire.shared import MappedSegments
from tempo.wire.stream import SocketStream, Stream
from tempo.wire.tensors import layout_of, raw, size_of
from tempo.worker.base import Base
from tempo.worker.budget import Budget
from tempo.worker.compute import Compute, Incoming
from tempo.worker.executor import Executor
from tempo.worker.jobs import Job, JobQueue
from tempo.worker.refusal import Refusal
from tempo.worker.transcript import Transcript

HELLO_TIMEOUT: Final = 15.0

STALLED: Final = 120.0
"""Seconds that a client may be silent in the middle of a frame, or leave an answer unread; between frames, for ever."""

log = logging.getLogger("tempo.worker")


@final
class Session:
    """Serves one connection until it ends. Sessions share the device and the memory budget, and nothing else."""

    def __init__(
        self, stream: Stream, compute: Compute, budget: Budget, peer: str, transcripts: Path | None, base: Base
    ) -> None:
        self._base = base
        self._compute, self._budget, self._peer, self._transcripts = compute, budget, peer, transcripts
        self._segments = MappedSegments() if isinstance(stream, SocketStream) and stream.is_unix else None
        self._channel: Channel[ToWorker] = Channel(stream, TO_WORKER, self._segments.size if self._segments else None)
        self._account = budget.open()
        self._queue = JobQueue()
        self._arriving: Job | None = None
        self._last_id = 0

    def run(self, greeted: Callable[[], None]) -> None:
        """Serve; returns when the connection has ended, by whichever side. Never raises for what the peer did.

        Args:
            greeted: Called once the peer has said hello.
        """
        threads: list[threading.Thread] = []
        over = threading.Event()
        try:
            executor = self._greet()
            greeted()
            for role, target, argument in ("beat", self._beat, over), ("compute", self._work, executor):
                thread = threading.Thread(target=target, args=(argument,), name=f"{role} {self._peer}", daemon=True)
                thread.start()
                threads.append(thread)
            while True:
                self._receive()
        except (EOFError, TimeoutError) as error:
            log.info("%s: %s", self._peer, error)
        except ProtocolError as error:
            log.warning("%s: connection closed: %s", self._peer, error)
            self._say_goodbye(str(error))
        except OSError as error:
            log.warning("%s: connection lost: %s", self._peer, error)
        finally:
            over.set()
            self._queue.close()
            self._channel.stream.shutdown()
            for thread in threads:
                thread.join()
            self._channel.close()
            self._account.close()

    def _greet(self) -> Executor:
        stream = self._channel.stream
        stream.set_timeout(HELLO_TIMEOUT)
        hello = self._channel.receive(_nothing_but_hello)
        if not isinstance(hello, Hello):
            raise ProtocolError(f"{type(hello).__name__} before hello")
        if hello.protocol != PROTOCOL:
            message = (
                f"this worker (Tempo {tempo.__version__}) speaks protocol {PROTOCOL}, the trusted side "
                f"(Tempo {hello.version}) protocol {hello.protocol}: install the same version on both"
            )
            self._channel.send(Failure(0, "refused", message))
            raise EOFError(message)
        stream.set_timeout(STALLED)
        transcript = None if self._transcripts is None else Transcript(self._transcripts, hello.session)
        capabilities = () if self._segments is None else ("shm",)
        self._channel.send(
            Welcome(PROTOCOL, tempo.__version__, self._compute.description, self._budget.limit, capabilities)
        )
        log.info("%s: session %s, Tempo %s", self._peer, hello.session, hello.version)
        return Executor(self._channel, self._segments, self._compute, self._account, transcript, self._base)

    def _receive(self) -> None:
        try:
            message = self._channel.receive(self._place)
        except TimeoutError:  # between two frames: nobody has to ask for anything
            return
        if isinstance(message, Segment):
            if self._segments is None:
                raise ProtocolError("a segment announced on a connection without shared memory")
            self._segments.accept(message.segment, message.size, self._channel.take_descriptor())
        job, self._arriving = self._arriving, None
        if job is not None:
            self._queue.put(job)

    def _place(self, message: ToWorker) -> Sequence[memoryview] | None:
        """Check the order, and find room for inline tensors before they are received."""
        if isinstance(message, Hello):
            raise ProtocolError("a second hello")
        if isinstance(message, Segment):
            return ()
        self._arriving = job = Job(message)
        if isinstance(message, Forget):
            return ()
        if message.id <= self._last_id:
            raise ProtocolError(f"request {message.id} after request {self._last_id}")
        self._last_id = message.id
        if not self._find_room(job, message.tensors):
            self._queue.wait_until_idle()  # what is about to be forgotten may be just enough
            if not self._find_room(job, message.tensors):
                return None
        refs = inline(message)
        job.size = sum(size_of(ref) for ref in refs)
        return [raw(job.incoming[ref.name].tensor) for ref in refs]

    def _find_room(self, job: Job, refs: tuple[TensorRef, ...]) -> bool:
        job.refusal = None
        try:
            for ref in refs:
                job.incoming[ref.name] = self._incoming(ref)
        except (Refusal, MemoryError) as error:
            for incoming in job.incoming.values():
                if incoming.block is not None:
                    self._account.pool.give(incoming.block)
            job.incoming.clear()
            job.refusal = error if isinstance(error, Refusal) else Refusal("out-of-memory", str(error))
        return job.refusal is None

    def _incoming(self, ref: TensorRef) -> Incoming:
        if ref.segment >= 0 and self._segments is not None:
            return Incoming(self._segments.tensor(ref))
        block = self._account.pool.take(size_of(ref))
        return Incoming(block.tensor(*layout_of(ref)), block)

    def _say_goodbye(self, why: str) -> None:
        self._channel.stream.set_timeout(1.0)
        try:
            self._channel.send(Failure(0, "bad-request", why[:1000]))
        except OSError:
            return  # the peer does not listen

    def _beat(self, over: threading.Event) -> None:
        """Send signs of life: from a thread of their own, since receiving and computing may both take long."""
        try:
            before = -1
            while not over.wait(BEAT):
                received = self._channel.stream.received
                self._channel.send(Alive(received == before and self._queue.idle))
                before = received
        except OSError:
            return  # the receiving thread notices, too

    @torch.inference_mode()
    def _work(self, executor: Executor) -> None:
        try:
            with self._compute.device.working():
                while (job := self._queue.get()) is not None:
                    executor.serve(job)
        except OSError as error:
            log.info("%s: could not answer: %s", self._peer, error)
        finally:
            self._queue.close()
            self._channel.stream.shutdown()  # wakes the receiving thread, which cleans up
            executor.close()


def _nothing_but_hello(message: ToWorker) -> Sequence[memoryview]:
    if not isinstance(message, Hello):
        raise ProtocolError(f"{type(message).__name__} before hello")
    return ()

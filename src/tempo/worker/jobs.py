"""The queue between a session's receiving and computing threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Final, final

from tempo.wire.messages import Forget, Request
from tempo.worker.compute import Incoming
from tempo.worker.refusal import Refusal

QUEUE_BYTES: Final = 256 << 20
QUEUE_JOBS: Final = 1024


@final
@dataclass(slots=True)
class Job:
    """A message with its tensors, or the reason why they were not received."""

    message: Request | Forget
    incoming: dict[str, Incoming] = field(default_factory=dict)
    size: int = 0
    refusal: Refusal | None = None


@final
class JobQueue:
    """Jobs in order, bounded in number and bytes, so that receiving can run ahead only so far."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()  # wakes a waiting thread sooner than a Condition
        self._room = threading.Condition()
        self._count = self._bytes = 0
        self._closed = False
        self._current: Job | None = None

    def put(self, job: Job) -> None:
        """Append, waiting for room."""
        with self._room:
            while not self._closed and self._count and self._full(job):
                self._room.wait()
            self._count += 1
            self._bytes += job.size
        self._jobs.put(job)

    def get(self) -> Job | None:
        """The next job, the one before being done; None once closed, since nobody is left to be answered."""
        if self._current is not None:
            with self._room:
                self._count -= 1
                self._bytes -= self._current.size
                self._room.notify()
        job = self._jobs.get()
        self._current = None if self._closed else job
        return self._current

    @property
    def idle(self) -> bool:
        """Whether all that was put is done."""
        return not self._count

    def wait_until_idle(self) -> None:
        """Wait until all that was put is done."""
        with self._room:
            while self._count and not self._closed:
                self._room.wait()

    def close(self) -> None:
        """Wake both sides."""
        with self._room:
            self._closed = True
            self._room.notify()
        self._jobs.put(None)

    def _full(self, job: Job) -> bool:
        return self._bytes + job.size > QUEUE_BYTES or self._count >= QUEUE_JOBS

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

    def put(self, job: Job) -> None:
        """Append, waiting for room."""
        with self._room:
            while not self._closed and self._count and self._full(job):
                self._room.wait()
            self._count += 1
            self._bytes += job.size
        self._jobs.put(job)

    def get(self) -> Job | None:
        """The next job; None once closed, when what is left has nobody to be answered to."""
        job = self._jobs.get()
        if job is None or self._closed:
            return None
        with self._room:
            self._count -= 1
            self._bytes -= job.size
            self._room.notify()
        return job

    def close(self) -> None:
        """Wake both sides."""
        with self._room:
            self._closed = True
            self._room.notify()
        self._jobs.put(None)

    def _full(self, job: Job) -> bool:
        return self._bytes + job.size > QUEUE_BYTES or self._count >= QUEUE_JOBS

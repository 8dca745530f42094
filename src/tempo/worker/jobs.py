"""The queue between a session's receiving and computing threads."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
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
        self._jobs: deque[Job] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closed = False

    def put(self, job: Job) -> None:
        """Append, waiting for room."""
        with self._changed:
            while not self._closed and self._jobs and self._full(job):
                self._changed.wait()
            self._jobs.append(job)
            self._bytes += job.size
            self._changed.notify()

    def get(self) -> Job | None:
        """The next job; None once closed."""
        with self._changed:
            while not self._closed and not self._jobs:
                self._changed.wait()
            if self._closed:
                return None
            job = self._jobs.popleft()
            self._bytes -= job.size
            self._changed.notify()
            return job

    def close(self) -> None:
        """Drop what is left: nobody is there to be answered."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()

    def _full(self, job: Job) -> bool:
        return self._bytes + job.size > QUEUE_BYTES or len(self._jobs) >= QUEUE_JOBS

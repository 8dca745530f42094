"""What a session notes for `tempo profile`: spans of time, and requests with their answers. No values, only names."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from torch.profiler import record_function

SCOPE: Final = "tempo"
SEPARATOR: Final = "|"
"""Between the parts of a scope's name: `SCOPE`, kind, what, and the layer, which is the user's own."""


@dataclass(frozen=True, slots=True)
class Span:
    """What a thread did for a while. Times are nanoseconds of `time.perf_counter_ns`."""

    kind: str
    """``mask``, ``verify``, ``wire``, ``wait`` or ``module``."""

    what: str
    """The operand, answer or message; of a module its type."""

    layer: str
    """The layer's name in its model, for the user."""

    thread: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it came over a link."""

    name: str
    began: int
    """When its header was there; its tensor follows, unless it lies in shared memory."""

    arrived: int
    computed: int
    """Nanoseconds of compute that the worker claims."""

    size: int


@dataclass(slots=True)
class Exchange:
    """A request to one worker, and what came back."""

    worker: str
    message: str
    layer: str
    sent: int
    """When sending it began."""

    size: int = 0
    answers: list[Answer] = field(default_factory=list)
    _began: int = 0

    def since(self, moment: int) -> Exchange:
        """The same with times counted from ``moment``."""
        answers = [replace(a, began=a.began - moment, arrived=a.arrived - moment) for a in self.answers]
        return replace(self, sent=self.sent - moment, answers=answers)

    def begins(self) -> None:
        """Note that an answer begins to come."""
        self._began = time.perf_counter_ns()

    def arrived(self, name: str, computed: int, size: int) -> None:
        """Note that it is there."""
        self.answers.append(Answer(name, self._began, time.perf_counter_ns(), computed, size))


class Trace:
    """Collects while `Stats.trace` is it; any thread may add to it."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.exchanges: list[Exchange] = []

    @contextmanager
    def span(self, kind: str, what: str, layer: str) -> Iterator[None]:
        """Note what is done inside: for PyTorch's profiler where that watches this thread, and here."""
        start = time.perf_counter_ns()
        try:
            with record_function(SEPARATOR.join((SCOPE, kind, what, layer))):
                yield
        finally:
            self.spans.append(Span(kind, what, layer, threading.get_ident(), start, time.perf_counter_ns()))

    def request(self, worker: str, message: str, layer: str) -> Exchange:
        """Note that a request is about to be sent."""
        exchange = Exchange(worker, message, layer, time.perf_counter_ns())
        self.exchanges.append(exchange)
        return exchange

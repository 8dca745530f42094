"""What a session counts."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, final

from tempo.engine.trace import Trace


@dataclass
class Stats:
    """Cumulative counts of a session. `Session.stats` returns a copy; subtract two copies to measure a stretch."""

    encryptions: dict[str, int] = field(default_factory=lambda: {"x": 0, "w": 0, "g": 0})
    """Operands masked: inputs, weights, output gradients (the paper's encryption counts)."""

    decryptions: dict[str, int] = field(default_factory=lambda: {"y": 0, "dx": 0, "dw": 0, "w": 0})
    """Answers unmasked; ``w`` counts weights, and what optimizers keep of them, that lived on workers."""

    elements: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("x", "w", "g", "y", "dx", "dw"), 0))
    """Of plain operands and answers of products that went out, each once, whatever was sent of it and how often; rows
    of gradients that are zero left out where that is known. ``w`` and ``dw`` count all that went out and came back of
    weights: these, what optimizers keep of them, gradients."""

    flops_offloaded: int = 0
    """Floating-point operations of products computed by workers, forward and backward."""

    flops_trusted: int = 0
    """Forward floating-point operations of supported layers that ran in the trusted process."""

    bytes_sent: int = 0
    bytes_received: int = 0

    seconds: dict[str, float] = field(
        default_factory=lambda: {"mask": 0.0, "verify": 0.0, "wire": 0.0, "worker": 0.0, "plan": 0.0}
    )
    """Wall time of the trusted process spent masking and unmasking; checking answers; and waiting, split by the
    workers' own account of their compute time into ``worker`` and the rest, ``wire``; and measuring what pays."""

    running: list[str] = field(default_factory=list, compare=False, repr=False)
    """What is being timed at this moment, innermost last."""

    trace: Trace | None = field(default=None, compare=False, repr=False)
    """Where each span is noted, while somebody wants to know."""

    def timed(self, what: str, operand: str = "", layer: str = "") -> Timed:
        """Add the time spent inside, on an ``operand`` of a ``layer``, to ``seconds[what]``, but for what is
        timed in there by itself.
        """
        return Timed(self, what, operand, layer)

    def copy(self) -> Stats:
        """An independent copy."""
        return Stats(
            dict(self.encryptions),
            dict(self.decryptions),
            dict(self.elements),
            self.flops_offloaded,
            self.flops_trusted,
            self.bytes_sent,
            self.bytes_received,
            dict(self.seconds),
        )

    def __sub__(self, earlier: Stats) -> Stats:
        return Stats(
            {k: v - earlier.encryptions[k] for k, v in self.encryptions.items()},
            {k: v - earlier.decryptions[k] for k, v in self.decryptions.items()},
            {k: v - earlier.elements[k] for k, v in self.elements.items()},
            self.flops_offloaded - earlier.flops_offloaded,
            self.flops_trusted - earlier.flops_trusted,
            self.bytes_sent - earlier.bytes_sent,
            self.bytes_received - earlier.bytes_received,
            {k: v - earlier.seconds[k] for k, v in self.seconds.items()},
        )


@final
class Timed:
    """See `Stats.timed`. There are some hundreds in a step: a generator would take three times as long."""

    __slots__ = ("_of", "_span", "_start", "_stats")

    def __init__(self, stats: Stats, *of: str) -> None:
        self._stats, self._of = stats, of
        self._span: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        stats = self._stats
        self._start = time.perf_counter()
        stats.running.append(self._of[0])
        if stats.trace is not None:
            self._span = stats.trace.span(*self._of)
            self._span.__enter__()

    def __exit__(self, *raised: Any) -> None:
        if self._span is not None:
            self._span.__exit__(*raised)
        seconds, running = self._stats.seconds, self._stats.running
        took = time.perf_counter() - self._start
        seconds[running.pop()] += took
        if running:
            seconds[running[-1]] -= took

"""Records one step: PyTorch's own profiler for the trusted layers, the session's trace for what it does itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, record_function

from tempo.engine.trace import SCOPE, SEPARATOR, Exchange, Trace

if TYPE_CHECKING:
    from tempo.session import Session

PHASES: Final = ("data", "forward", "loss", "backward", "clip", "optimizer")
"""Scopes of `torch.profiler.record_function` that a step may be divided into."""

_BACKWARD: Final = "autograd::engine::evaluate_function: "
_GLUE: Final = {
    "_Offload": "forward",
    "_WeightGate": "forward",
    "_OffloadBackward": "backward",
    "_WeightGateBackward": "backward",
}
"""Autograd nodes of the engine: what they do besides masking, checking, sending and waiting."""

_MARK: Final = "tempo clock"


@dataclass(frozen=True, slots=True)
class Interval:
    """A stretch of the trusted process's time, in nanoseconds from the beginning of the step."""

    start: int
    end: int
    kind: str
    """``mask``, ``verify``, ``plan``, ``wire``, ``wait``, ``module``, ``gradient`` (the backward pass of a
    module), ``engine``, one of `PHASES`, or ``op``."""

    what: str = ""
    """The operand, answer or message, the type of the module, or the operation."""

    layer: str = ""

    @property
    def waits(self) -> bool:
        """Whether nothing is done but waiting for a worker."""
        return self.kind == "wait" or (self.kind, self.what) == ("wire", "acknowledgement")


@dataclass(frozen=True)
class Recording:
    """One step."""

    duration: int
    """Nanoseconds."""

    thread: list[Interval]
    """What the thread did that took the step: nested, outer before inner."""

    others: dict[int, list[Interval]]
    """What other threads of the trusted process did for it, by thread."""

    exchanges: list[Exchange]
    """Requests and answers, their times from the beginning of the step, too."""


def record(step: Callable[[], object], model: nn.Module, session: Session | None) -> Recording:
    """Take a step and record it.

    Args:
        step: What to record.
        model: The model that it trains.
        session: What protects the model, if anything does.

    Returns:
        The recording. Recording costs some microseconds an operation.
    """
    trace = Trace()
    modules = _Modules(model, trace)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        marks = [_mark(), _mark()]  # the first one warms up
        with modules, _traced(session, trace):
            start = time.perf_counter_ns()
            step()
            end = time.perf_counter_ns()
        marks.append(_mark())
    return _assemble(trace, list(profiler.events() or ()), marks, start, end)


class _Modules:
    """Makes a scope of each run of a module."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self._trace = trace
        self._names = {module: name or type(model).__name__ for name, module in model.named_modules()}
        self._inside: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._hooks = [
            register_module_forward_pre_hook(self._enters),
            register_module_forward_hook(self._leaves, always_call=True),
        ]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enters(self, module: nn.Module, _: Any) -> None:
        if module in self._names:
            span = self._trace.span("module", type(module).__name__, self._names[module])
            span.__enter__()
            self._inside.append(span)

    def _leaves(self, module: nn.Module, *_: Any) -> None:
        if module in self._names:
            self._inside.pop().__exit__(None, None, None)


@contextmanager
def _traced(session: Session | None, trace: Trace) -> Iterator[None]:
    if session is None:
        yield
        return
    stats = session._engine.stats
    stats.trace = trace
    try:
        yield
    finally:
        stats.trace = None


def _mark() -> int:
    """A moment that is on both clocks, ours and the profiler's: the middle of a scope."""
    before = time.perf_counter_ns()
    with record_function(_MARK):
        pass
    after = time.perf_counter_ns()
    return (before + after) // 2


def _assemble(trace: Trace, events: Sequence[Any], marks: list[int], start: int, end: int) -> Recording:
    theirs = [(e.time_range.start + e.time_range.end) * 500 for e in events if e.name == _MARK]
    rate = (marks[-1] - marks[1]) / (theirs[-1] - theirs[1])

    def since(microseconds: float) -> int:
        return int(marks[1] - start + (microseconds * 1000 - theirs[1]) * rate)

    main = next(e.thread for e in events if e.name == _MARK)
    mine = [e for e in events if e.thread == main and e.name != _MARK]
    others: dict[int, list[Interval]] = {}
    for span in trace.spans:
        if span.thread != threading.get_ident():
            interval = Interval(span.start - start, span.end - start, span.kind, span.what, span.layer)
            others.setdefault(span.thread, []).append(interval)
    return Recording(
        end - start,
        nested(_intervals([(since(e.time_range.start), since(e.time_range.end), e) for e in mine]), end - start),
        {number: nested(spans, end - start) for number, spans in others.items()},
        [exchange.since(start) for exchange in trace.exchanges],
    )


def _intervals(events: list[tuple[int, int, Any]]) -> list[Interval]:
    """What PyTorch's profiler saw of the thread; operations of the backward pass belong to the module of their node.

    A node has the number that its operation saw as the next one: the last operation that saw it is the one.
    """
    events.sort(key=lambda event: (event[0], -event[1]))
    makers: dict[int, Interval] = {}
    modules: list[Interval] = []
    found: list[Interval] = []
    for start, end, event in events:
        while modules and modules[-1].end <= start:
            modules.pop()
        name, number = event.name.removeprefix(_BACKWARD), event.sequence_nr
        if name.startswith(SCOPE + SEPARATOR):
            interval = Interval(start, end, *name.split(SEPARATOR, 3)[1:])
            if interval.kind == "module":
                modules.append(interval)
        elif name in _GLUE:
            module = makers.get(number) if "Backward" in name else modules[-1] if modules else None
            interval = Interval(start, end, "engine", _GLUE[name], module.layer if module else "")
        elif name != event.name:
            module = makers.get(number)
            interval = Interval(start, end, "gradient", *((module.what, module.layer) if module else (name, "")))
        elif name in PHASES:
            interval = Interval(start, end, name)
        else:
            interval = Interval(start, end, "op", name)
        found.append(interval)
        if number >= 0 and event.scope == 0:
            makers.pop(number, None)
            if modules:
                makers[number] = modules[-1]
    return found


def nested(intervals: Sequence[Interval], duration: int) -> list[Interval]:
    """``intervals`` in order, outer before inner, cut to the step and to what they lie in.

    Times were rounded, by which the ends of one may stick out of another.
    """
    result: list[Interval] = []
    around: list[Interval] = []
    for interval in sorted(intervals, key=lambda i: (i.start, -i.end)):
        while around and around[-1].end <= interval.start:
            around.pop()
        last = around[-1].end if around else duration
        cut = replace(interval, start=max(0, interval.start), end=min(interval.end, last))
        if cut.end > cut.start:
            result.append(cut)
            around.append(cut)
    return result

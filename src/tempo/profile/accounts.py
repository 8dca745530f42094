"""Sums a recording up: every nanosecond of the step once, by what it was spent on."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from tempo.engine.trace import Answer, Exchange
from tempo.profile.recording import PHASES, Interval, Recording

GROUPS: Final = {
    "mask": "masks",
    "verify": "checks",
    "wire": "wire",
    "worker": "waiting for workers",
    "engine": "engine",
    "plan": "engine",
    "module": "trusted layers",
    "gradient": "trusted layers",
    **dict.fromkeys(PHASES, "loss, optimizer, data"),
    "rest": "the rest",
}
"""What kinds of intervals count as."""

_TIMES: Final = ("mask", "verify", "wire", "worker", "computed")


@dataclass
class Layer:
    """What one offloaded product, or several that go together, took. Times in nanoseconds."""

    name: str
    mask: int = 0
    verify: int = 0
    wire: int = 0
    """Sending, and waiting while the worker was not computing."""

    worker: int = 0
    """Waiting while the worker was computing, as the worker says."""

    computed: int = 0
    """What workers computed for it, as they say, waited for or not."""

    requests: int = 0
    sent: int = 0
    received: int = 0


@dataclass(frozen=True, slots=True)
class Computing:
    """A worker's account of one answer, placed where it ended at the latest: when the answer began to arrive."""

    start: int
    end: int
    exchange: Exchange
    answer: Answer


@dataclass
class Accounts:
    """Where one step's time went, in nanoseconds."""

    duration: int
    spent: dict[tuple[str, str], int]
    """The thread that took the step, by kind and what; the sum is ``duration``."""

    elsewhere: dict[str, int]
    """Other threads of the trusted process, by kind, beside it."""

    layers: list[Layer]
    """Of offloaded products, dearest first."""

    workers: dict[str, list[Computing]] = field(default_factory=dict)

    def groups(self) -> dict[str, int]:
        """The step's time by `GROUPS`."""
        found = dict.fromkeys(GROUPS.values(), 0)
        for (kind, _), spent in self.spent.items():
            found[GROUPS[kind]] += spent
        return found

    def parts(self, group: str) -> dict[str, int]:
        """What one of the `GROUPS` consists of, by operand, type of module or phase, most first."""
        found: dict[str, int] = defaultdict(int)
        for (kind, what), spent in self.spent.items():
            if GROUPS[kind] == group:
                found[what or kind] += spent
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def waiting(self) -> int:
        """How long the trusted thread had nothing to do: it waited for a worker or for bytes from it."""
        return self.spent.get(("worker", ""), 0) + self.spent.get(("wire", "waiting"), 0)

    @property
    def computed(self) -> dict[str, int]:
        """How long each worker computed, as it says."""
        return {worker: sum(c.end - c.start for c in computing) for worker, computing in self.workers.items()}

    @property
    def bound(self) -> int:
        """The step if nobody ever waited: as long as whoever has most to do, this side or a worker."""
        return max(self.duration - self.waiting, *self.computed.values(), 0)

    def figures(self) -> dict[str, Any]:
        """Everything in seconds and bytes, as plain data."""
        return {
            "seconds": self.duration / 1e9,
            "groups": {name: spent / 1e9 for name, spent in self.groups().items()},
            "spent": [[kind, what, spent / 1e9] for (kind, what), spent in self.spent.items()],
            "other threads": {kind: spent / 1e9 for kind, spent in self.elsewhere.items()},
            "layers": [
                {f.name: v / 1e9 if f.name in _TIMES else v for f in fields(it) for v in [getattr(it, f.name)]}
                for it in self.layers
            ],
            "workers": {worker: busy / 1e9 for worker, busy in self.computed.items()},
            "trusted alone": (self.duration - self.waiting) / 1e9,
            "bound": self.bound / 1e9,
        }


def account(recording: Recording) -> Accounts:
    """Sum ``recording`` up."""
    workers = place(recording.exchanges)
    spent: dict[tuple[str, str], int] = defaultdict(int)
    layers: dict[str, Layer] = {}
    for it in stretches(recording, workers):
        length = it.end - it.start
        spent[it.kind, it.what] += length
        if it.kind in ("mask", "verify", "wire", "worker"):
            layer = layers.setdefault(it.layer, Layer(it.layer))
            setattr(layer, it.kind, getattr(layer, it.kind) + length)
    for c in itertools.chain(*workers.values()):
        layers.setdefault(c.exchange.layer, Layer(c.exchange.layer)).computed += c.end - c.start
    for exchange in recording.exchanges:
        layer = layers.setdefault(exchange.layer, Layer(exchange.layer))
        layer.requests += 1
        layer.sent += exchange.size
        layer.received += sum(answer.size for answer in exchange.answers)
    elsewhere: dict[str, int] = defaultdict(int)
    for intervals in recording.others.values():
        for it in _alone(intervals, recording.duration):
            if it.kind != "rest":
                elsewhere[it.kind] += it.end - it.start
    dearest = sorted(layers.values(), key=lambda it: -(it.mask + it.verify + it.wire + it.worker))
    return Accounts(recording.duration, dict(spent), dict(elsewhere), dearest, workers)


def stretches(recording: Recording, workers: Mapping[str, Sequence[Computing]]) -> Iterator[Interval]:
    """The step from its beginning to its end without gaps, where waiting is ``worker`` while any of them computes."""
    busy = _union([(c.start, c.end) for computing in workers.values() for c in computing])
    for it in _alone(recording.thread, recording.duration):
        if it.waits:
            now = it.start
            for start, end in busy[bisect_right(busy, it.start, key=lambda span: span[1]) :]:
                if start >= it.end:
                    break
                if start > now:
                    yield Interval(now, start, "wire", "waiting", it.layer)
                yield Interval(max(now, start), min(end, it.end), "worker", "", it.layer)
                now = min(end, it.end)
            if now < it.end:
                yield Interval(now, it.end, "wire", "waiting", it.layer)
        else:
            yield replace(it, what="sending") if it.kind == "wire" else it


def _alone(intervals: Sequence[Interval], duration: int) -> Iterator[Interval]:
    """Each moment of the step once, as part of the innermost interval around it that is no mere operation."""
    around = [Interval(0, duration, "rest")]
    now = 0
    for interval in [*(i for i in intervals if i.kind != "op"), Interval(duration, duration, "rest")]:
        while len(around) > 1 and around[-1].end <= interval.start:
            last = around.pop()
            if last.end > now:
                yield replace(last, start=now)
                now = last.end
        if interval.start > now:
            yield replace(around[-1], start=now, end=interval.start)
            now = interval.start
        around.append(interval)


def place(exchanges: Sequence[Exchange]) -> dict[str, list[Computing]]:
    """Where in the step each worker computed, as it says: never before its request was sent, never two at once."""
    found: dict[str, list[Computing]] = defaultdict(list)
    answers = [(answer, exchange) for exchange in exchanges for answer in exchange.answers]
    for answer, exchange in sorted(answers, key=lambda pair: pair[0].began):
        before = found[exchange.worker][-1].end if found[exchange.worker] else exchange.sent
        start = max(exchange.sent, before, answer.began - max(0, answer.computed))
        found[exchange.worker].append(Computing(min(start, answer.began), answer.began, exchange, answer))
    return dict(found)


def _union(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged

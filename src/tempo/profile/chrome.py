"""A recording in Chrome's Trace Event format, which https://ui.perfetto.dev and chrome://tracing show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from tempo.profile.accounts import Accounts
from tempo.profile.recording import Interval, Recording

TRUSTED, WIRE, WORKERS = 1, 2, 3
"""Processes of the trace."""

_VERBS: Final = {"mask": "mask", "verify": "check", "wire": "send", "wait": "wait for"}
_ANSWERS: Final = ("y", "dx", "dw")


def write(file: Path, recording: Recording, accounts: Accounts, about: dict[str, str]) -> None:
    """Write ``recording`` to ``file``; ``about`` says of what it is, and where it was made."""
    content = {
        "traceEvents": list(_events(recording, accounts)),
        "displayTimeUnit": "ms",
        "otherData": about,
        "tempo": accounts.figures(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgspec.json.encode(content))


def _events(recording: Recording, accounts: Accounts) -> Iterator[dict[str, Any]]:
    yield from _named(TRUSTED, "trusted process", {1: "training thread"})
    yield _span(TRUSTED, 1, "step", "step", 0, recording.duration)
    for interval in recording.thread:
        yield _work(1, interval)
    for track, intervals in enumerate(recording.others.values(), 2):
        yield from _named(TRUSTED, "", {track: f"thread {track}"})
        for interval in intervals:
            yield _work(track, interval)

    tracks = {worker: track for track, worker in enumerate(dict.fromkeys(e.worker for e in recording.exchanges), 1)}
    yield from _named(WIRE, "wire", {track: f"from {worker}" for worker, track in tracks.items()})
    yield from _named(WORKERS, "workers, as they say", {track: worker for worker, track in tracks.items()})
    for number, exchange in enumerate(recording.exchanges, 1):
        track = tracks[exchange.worker]
        end = max((answer.arrived for answer in exchange.answers), default=recording.duration)
        name = f"{exchange.message} {exchange.layer}"
        flight = {"name": name, "cat": "request", "id": number, "pid": WIRE, "tid": track}
        sizes = {"worker": exchange.worker, "bytes sent": exchange.size, "answers": len(exchange.answers)}
        yield {**flight, "ph": "b", "ts": exchange.sent / 1000, "args": sizes}
        yield {**flight, "ph": "e", "ts": end / 1000}
        for answer in exchange.answers:
            label = answer.name or "acknowledgement"
            received = {"request": number, "bytes": answer.size}
            yield _span(
                WIRE, track, f"receive {label} {exchange.layer}", "receive", answer.began, answer.arrived, received
            )
    for worker, computing in accounts.workers.items():
        for c in computing:
            what = f"{c.exchange.message} {c.answer.name}".rstrip()
            claim = {"says (µs)": c.answer.computed / 1000}
            yield _span(WORKERS, tracks[worker], f"{what} {c.exchange.layer}", "compute", c.start, c.end, claim)


def _work(track: int, interval: Interval) -> dict[str, Any]:
    what, layer = interval.what, interval.layer
    match interval.kind:
        case "mask" | "verify" | "wire" | "wait":
            verb = "unmask" if (interval.kind, what in _ANSWERS) == ("mask", True) else _VERBS[interval.kind]
            name = f"{'wait for' if interval.waits else verb} {what} {layer}"
        case "module":
            name = f"{layer} ({what})"
        case "gradient":
            name = f"backward {what} {layer}".rstrip()
        case "engine":
            name = f"engine {layer}"
        case "op":
            name = what
        case phase:
            name = phase
    return _span(TRUSTED, track, name, interval.kind, interval.start, interval.end)


def _span(
    process: int, track: int, name: str, category: str, start: int, end: int, args: dict[str, Any] | None = None
) -> dict[str, Any]:
    times = {"ts": start / 1000, "dur": (end - start) / 1000}
    return {"ph": "X", "pid": process, "tid": track, "name": name, "cat": category, **times, "args": args or {}}


def _named(process: int, name: str, tracks: dict[int, str]) -> Iterator[dict[str, Any]]:
    if name:
        yield {"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": process, "tid": 0, "name": "process_sort_index", "args": {"sort_index": process}}
    for track, title in tracks.items():
        yield {"ph": "M", "pid": process, "tid": track, "name": "thread_name", "args": {"name": title}}

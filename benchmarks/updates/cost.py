"""What updates on workers save and cost: bytes, encryptions and the trusted side's seconds, over tokens per step.

The linear layers of one transformer block, without attention, against a worker that answers at once; all variants in
turn on one core, over whole periods of masks. Seconds are the trusted process's own, of a CPU: what others do on the
machine counts only through caches and memory. Bytes are compared with the model by which ``update="auto"`` decides.

    OMP_NUM_THREADS=1 python benchmarks/updates/cost.py FILE.json [WIDTH]
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tempo.bench.measure import machine, null_session, per_step
from tempo.engine.memory import keep_heap
from tempo.engine.stats import Stats
from tempo.engine.update_cost import update_cost
from tempo.session import Session
from tempo.settings import Settings

ROWS = (256, 512, 1024, 2048, 4096, 8192, 16384)
SCHEMES = ("tempo-signed", "mix")
PLACES = ("trusted", "worker")
MOMENTA = (0.0, 0.9)
LEAST_STEPS = 3
REKEYS = 7


class Block(nn.Module):
    """Query, key and value; output; two layers of an MLP. In place of attention, something element-wise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, 1)
        x = x + self.out(torch.sigmoid(q * k) * v)
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Training:
    """Steps of one variant."""

    def __init__(self, session: Session, width: int, momentum: float) -> None:
        torch.manual_seed(0)
        self.session, self.momentum = session, momentum
        self.model = session.protect(Block(width), base="secret")
        self.optimizer = session.optimizer(torch.optim.SGD(self.model.parameters(), 1e-4, momentum=momentum))
        self.times: list[float] = []

    def step(self, x: Tensor) -> None:
        start = time.process_time()
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.times.append(time.process_time() - start)

    def finish(self) -> None:
        self.session.unprotect(self.model)


def expected_bytes(width: int, rows: int, rekey_rows: int, place: str, momentum: float) -> float:
    """Per step, both ways together."""
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    cost = update_cost(rows, rekey_rows, 1 if momentum else 0)
    activations = sum(2 * rows * (m + d) for m, d in shapes)
    return 4 * (activations + (cost.worker if place == "worker" else cost.trusted) * sum(m * d for m, d in shapes))


def figures(used: Stats, training: Training, steps: int, period: int, rows: int, width: int) -> dict[str, Any]:
    settings = training.session.settings
    expected = expected_bytes(width, rows, settings.rekey_rows, settings.update, training.momentum)
    return {
        "scheme": settings.scheme,
        "update": settings.update,
        "momentum": training.momentum,
        "rows": rows,
        "period": period,
        "steps": steps,
        "encryptions": {operand: count / steps for operand, count in used.encryptions.items()},
        "bytes_up": used.bytes_sent / steps,
        "bytes_down": used.bytes_received / steps,
        "bytes_expected": expected,
        "trusted_seconds": per_step(training.times[-steps:], period),
    }


def compare(sessions: dict[tuple[str, str, float], Session], width: int, rows: int) -> list[dict[str, Any]]:
    """All variants at so many rows per step."""
    x = torch.randn(rows, width, requires_grad=True)
    period = math.ceil(Settings().rekey_rows / rows)
    steps = math.ceil(LEAST_STEPS / period) * period
    trainings = [Training(session, width, momentum) for (*_, momentum), session in sessions.items()]
    for training in trainings:
        training.step(x)
    before = [training.session.stats() for training in trainings]
    for _ in range(steps):
        for training in trainings:
            training.step(x)
    found = []
    for training, earlier in zip(trainings, before, strict=True):
        each = period if training.session.settings.update == "worker" else 1
        found.append(figures(training.session.stats() - earlier, training, steps, each, rows, width))
        training.finish()
    return found


def rekey(session: Session, width: int, momentum: float) -> dict[str, Any]:
    """What one change of masks takes, of all weights of the block: a step after it against one without, in turn."""
    x = torch.randn(64, width, requires_grad=True)
    training = Training(session, width, momentum)
    training.step(x)
    training.step(x)
    usual, fetching, storing, sent, received = [], [], [], 0, 0
    for _ in range(REKEYS):
        before = session.stats()
        training.step(x)
        between = session.stats()
        start = time.process_time()
        session.fetch_weights()
        fetching.append(time.process_time() - start)
        usual.append(training.times[-1])
        training.step(x)
        storing.append(training.times[-1])
        after = session.stats()
        sent += after.bytes_sent - 2 * between.bytes_sent + before.bytes_sent
        received += after.bytes_received - 2 * between.bytes_received + before.bytes_received
    training.finish()
    return {
        "scheme": session.settings.scheme,
        "momentum": momentum,
        "elements": 12 * width**2,
        "bytes_up": sent / REKEYS,
        "bytes_down": received / REKEYS,
        "fetch_seconds": median(fetching),
        "store_seconds": median(storing) - median(usual),
        "usual_step_seconds": median(usual),
    }


def show(results: list[dict[str, Any]]) -> None:
    print("rows   scheme        momentum   MB trusted   worker   seconds trusted   worker")
    by = {(r["rows"], r["scheme"], r["momentum"], r["update"]): r for r in results}
    for rows, scheme, momentum in itertools.product(sorted({r["rows"] for r in results}), SCHEMES, MOMENTA):
        here, away = (by[rows, scheme, momentum, place] for place in PLACES)
        sizes = [(r["bytes_up"] + r["bytes_down"]) / 1e6 for r in (here, away)]
        print(
            f"{rows:6,} {scheme:13} {momentum:8} {sizes[0]:12.1f} {sizes[1]:8.1f}"
            f" {here['trusted_seconds']:17.3f} {away['trusted_seconds']:8.3f}",
            flush=True,
        )


def main(target: Path, width: int) -> None:
    torch.set_num_threads(1)
    keep_heap()
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        sessions = {}
        for scheme, momentum, place in itertools.product(SCHEMES, MOMENTA, PLACES):
            settings = Settings(scheme=scheme, update=place, placement="all", base="secret", local_threads=1)
            sessions[scheme, place, momentum] = stack.enter_context(null_session(settings))
        for rows in ROWS:
            results += compare(sessions, width, rows)
            show(results[-len(sessions) :])
        away = {key: session for key, session in sessions.items() if key[1] == "worker"}
        rekeys = [rekey(session, width, momentum) for (*_, momentum), session in away.items()]
    worst = max(abs(r["bytes_up"] + r["bytes_down"] - r["bytes_expected"]) / r["bytes_expected"] for r in results)
    print(f"bytes differ from the model by {worst:.1e} at most")
    for found in rekeys:
        print(
            f"one rekey, {found['scheme']}, momentum {found['momentum']}: {found['bytes_up'] / 1e6:.1f} MB up, "
            f"{found['bytes_down'] / 1e6:.1f} MB down, {found['fetch_seconds'] * 1e3:.0f} ms to fetch, "
            f"{found['store_seconds'] * 1e3:.0f} ms to store, a step being {found['usual_step_seconds'] * 1e3:.0f} ms"
        )
    kept = {"machine": machine(), "width": width, "rekey_rows": Settings().rekey_rows, "worst_bytes_error": worst}
    target.write_text(json.dumps({**kept, "steps": results, "rekeys": rekeys}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 384)

"""Whether updates on workers give the numbers of updates here, and of plain PyTorch: every legal pair, a run each.

A small ViT on scikit-learn's digits. Differences are relative: of the loss, the largest of all steps; of the weights of
fully connected layers, which are what workers update, the largest of all matrices after the last step, as Frobenius
norms. Beside each stand two controls of the same optimizer, plain runs that differ in rounding alone: two threads, not
one, and the images of each batch in another order.

    OMP_NUM_THREADS=1 python benchmarks/updates/equality.py [FILE.json] [STEPS]
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

# Before torch is loaded: on few cores, threads that spin while they wait keep the workers from working.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import tempo
from tempo import schemes
from tempo.bench.measure import machine
from tempo.optim import Lion, Muon
from tempo.optim.rules import KINDS
from tempo.recipes import data
from tempo.recipes.models import VitSmall, logits
from tempo.session import Session

BATCH = 8
MODEL = VitSmall(width=64, depth=2, heads=2, mlp=128, patch=2)
SCHEMES = ("tempo-signed", "mix")

Optimizers = Callable[[nn.Module], list[torch.optim.Optimizer]]


def sgd(lr: float, **options: Any) -> Optimizers:
    return lambda model: [torch.optim.SGD(model.parameters(), lr, **options)]


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """As it is meant to be used: for matrices between first and last layer, beside another optimizer for the rest."""
    inner = {id(p) for name, p in model.named_parameters() if ".layer" in name and p.dim() == 2}
    matrices = [p for p in model.parameters() if id(p) in inner]
    rest = [p for p in model.parameters() if id(p) not in inner]
    return [Muon(matrices, 0.002, weight_decay=0.1), torch.optim.SGD(rest, 0.002, momentum=0.9)]


OPTIMIZERS: dict[str, Optimizers] = {
    "SGD": sgd(0.01),
    "momentum": sgd(0.002, momentum=0.9),
    "Nesterov": sgd(0.002, momentum=0.9, nesterov=True),
    "weight decay": sgd(0.002, momentum=0.9, weight_decay=0.01),
    "Muon": muon,
    "Adam": lambda model: [torch.optim.Adam(model.parameters(), 3e-4)],
    "AdamW": lambda model: [torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.1)],
    "Lion": lambda model: [Lion(model.parameters(), 3e-5, weight_decay=0.1)],
}


@dataclass
class Run:
    """How one run went."""

    losses: Tensor
    weights: dict[str, Tensor]
    on_workers: float = 0.0
    """Share of the weights' elements that lived on workers at the end."""

    def apart(self, other: Run) -> dict[str, float]:
        """The worst relative differences from ``other``."""
        weights = (float((w - other.weights[name]).norm() / w.norm()) for name, w in self.weights.items())
        return {"loss": float(((self.losses - other.losses) / other.losses).abs().max()), "weights": max(weights)}


def train(model: nn.Module, make: Optimizers, steps: int, session: Session | None = None, reverse: bool = False) -> Run:
    source = data.load("digits")
    images, order = source.format(), data.Order(len(source.train), BATCH, 0)
    if session is not None:
        session.protect(model, base="secret")
    optimizers = make(model.train())
    if session is not None:
        optimizers = [session.optimizer(optimizer) for optimizer in optimizers]
    losses = []
    for _ in range(steps):
        chosen = order.batch().flip(0) if reverse else order.batch()
        order.advance()
        x, labels = images.numbers(source.train.images[chosen]), source.train.labels[chosen]
        loss = F.cross_entropy(logits(model, x), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    matrices = {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    away = [] if session is None else [p.numel() for r in session._engine.residences for p in r.parameters]
    share = sum(away) / sum(w.numel() for w in matrices.values())
    state = model.state_dict()
    return Run(torch.tensor(losses, dtype=torch.float64), {name: state[name].clone() for name in matrices}, share)


def legal(scheme: str, optimizers: list[torch.optim.Optimizer]) -> bool:
    commutes = schemes.create(scheme).commutes
    return commutes == "with any" or all(KINDS[type(o)].rotates for o in optimizers)


class Sessions:
    """One for each kind of run."""

    def __init__(self) -> None:
        self._stack, self._open = ExitStack(), {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, start: nn.Module, make: Optimizers, steps: int, scheme: str, update: str) -> Run:
        linear = all(KINDS[type(o)].linear for o in make(start))
        fields = {"scheme": scheme, "update": update, "verify": "always" if linear else "off"}
        kind = tuple(fields.values())
        if kind not in self._open:
            session = tempo.connect(base="secret", placement="all", local_threads=1, **fields)
            self._open[kind] = self._stack.enter_context(session)
        model = copy.deepcopy(start)
        try:
            return train(model, make, steps, self._open[kind])
        finally:
            self._open[kind].unprotect(model)


def compare(sessions: Sessions, name: str, start: nn.Module, steps: int) -> list[dict[str, Any]]:
    """All legal pairs of one optimizer."""
    make = OPTIMIZERS[name]
    began = time.perf_counter()
    plain = train(copy.deepcopy(start), make, steps)
    torch.set_num_threads(2)
    threads = train(copy.deepcopy(start), make, steps).apart(plain)
    torch.set_num_threads(1)
    order = train(copy.deepcopy(start), make, steps, reverse=True).apart(plain)
    print(f"{name}, plain and controls: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    found = []
    for scheme in SCHEMES:
        if not legal(scheme, make(start)):
            continue
        began = time.perf_counter()
        here, away = (sessions.run(start, make, steps, scheme, update) for update in ("trusted", "worker"))
        if not away.on_workers:
            raise SystemExit(f"{scheme}, {name}: no weight lived on the worker, so this compares nothing")
        found.append(
            {
                "optimizer": name,
                "scheme": scheme,
                "first_loss": float(plain.losses[:10].mean()),
                "last_loss": float(plain.losses[-10:].mean()),
                "on_workers": away.on_workers,
                "against_trusted": away.apart(here),
                "against_plain": away.apart(plain),
                "trusted_against_plain": here.apart(plain),
                "control_threads": threads,
                "control_order": order,
            }
        )
        print(f"{name}, {scheme}: {found[-1]}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def table(results: list[dict[str, Any]], steps: int) -> Table:
    shown = Table(title=f"worst relative differences in {steps} steps: loss / weights")
    columns = {
        "worker against trusted updates": "against_trusted",
        "worker against plain": "against_plain",
        "trusted against plain": "trusted_against_plain",
        "control: 1, 2 threads": "control_threads",
        "control: order in batch": "control_order",
    }
    for column in ("optimizer", "scheme", "mean loss", "on workers", *columns):
        shown.add_column(column)
    for r in results:
        pairs = [f"{r[key]['loss']:.0e} / {r[key]['weights']:.0e}" for key in columns.values()]
        losses = f"{r['first_loss']:.2f} to {r['last_loss']:.2f}"
        shown.add_row(r["optimizer"], r["scheme"], losses, f"{r['on_workers']:.0%}", *pairs)
    return shown


def main(target: Path | None, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = MODEL.build(1, 8, 10)
    with Sessions() as sessions:
        results = [line for name in OPTIMIZERS for line in compare(sessions, name, start, steps)]
    Console(width=160).print(table(results, steps))
    if target is not None:
        kept = {"machine": machine(), "model": repr(MODEL), "batch": BATCH, "steps": steps, "pairs": results}
        target.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None, int(sys.argv[2]) if len(sys.argv) > 2 else 200)

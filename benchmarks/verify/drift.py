"""How far honest workers' weights part from their sketches over many updates, what is found meanwhile, and the cost.

A worker updates a masked weight in float32 from fresh batches under fresh row masks; the same weight in float64 tells
the true drift. At each mark: the largest residual over tolerance of honest outputs and input gradients since the last
one, the drift that the tolerance counts on next to the true one, and the smallest update, relative to the weight, that
is found with probability 1/2 and 0.99 where a worker leaves it out: of the direction of the last one, in the row where
it shows most. What checks of fetched weights find is there too.

    OMP_NUM_THREADS=1 python benchmarks/verify/drift.py [FILE.json [STEPS]]
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from tempo.bench.measure import machine
from tempo.engine.memory import keep_heap
from tempo.keys import KeySchedule
from tempo.schemes.masks import Mask, Masks, draw_blocks
from tempo.verify.checks import WeightCheck
from tempo.verify.sketch import Sketch
from tempo.verify.tolerance import Rounding, threshold, unseen_ratio
from tempo.wire.messages import Linear, Sgd
from tempo.worker.update import apply

KEYS = KeySchedule()
ROWS, BLOCK, VECTORS, POOL = 256, 32, 4, 48
RELATIVE = 1e-3
"""Length of the first update next to the weight's, without momentum."""
SHAPES = {"384 → 384": ((384, 384), 1.0), "384 → 1536": ((1536, 384), 0.2)}
"""Weights, and how many of the steps they are given."""
NUMBERS = {
    "plain": {"momentum": 0.0, "weight_decay": 0.0},
    "momentum": {"momentum": 0.9, "weight_decay": 0.0},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.005},
}
COSTS = ((256, 384, 384), (4160, 768, 768), (4160, 768, 3072), (16384, 768, 768))


def rule(momentum: float, weight_decay: float) -> Sgd:
    """At a rate that float32 knows; with momentum a tenth of it, so that all go equally far."""
    rate = 2**-4 if momentum == 0 else 2**-7
    numbers = (float(torch.tensor(n)) for n in (momentum, weight_decay))
    return Sgd(rate, next(numbers), 0.0, next(numbers), False, False)


def mask(size: int) -> Mask:
    return draw_blocks(KEYS.fresh(0, "mask").stream("mask"), size, BLOCK, 1, 1.0)


class Features:
    """Rows with few strong directions and a common part, as activations and gradients have."""

    def __init__(self, width: int) -> None:
        spectrum = torch.arange(1, width + 1).pow(-0.5)
        self.mix = spectrum.unsqueeze(1) * torch.linalg.qr(torch.randn(width, width))[0]
        self.mean = 0.3 * torch.randn(width)

    def rows(self, count: int) -> Tensor:
        mixed = torch.randn(count, len(self.mean)) @ self.mix
        return mixed / mixed.std() + self.mean


class Run:
    """One weight under one rule, at a worker, in float64, and as a sketch."""

    def __init__(self, w: Tensor, step: Sgd) -> None:
        self.w, self.exact, self.step = w.clone(), w.double(), step
        self.sketch = Sketch(w, KEYS.fresh(0, "w"), vectors=VECTORS)
        self.states: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        self.worst = {"y": 0.0, "dx": 0.0, "w": 0.0}
        self.start = self.before = w

    def update(self, x: Tensor, g: Tensor, masks: Masks, gradients: tuple[Tensor, Tensor]) -> None:
        self.sketch.accumulate(x, g, masks)
        self.before = self.w.clone()
        apply(self.step, self.w, gradients[0].clone(), self.states[0])
        apply(self.step, self.exact, gradients[1].clone(), self.states[1])
        self.sketch.update(self.step)

    def check(self, x_masked: Tensor, g_masked: Tensor) -> None:
        source = self.sketch.check.forward(x_masked, KEYS.fresh(0, "x"), keep=False)
        gradient = source.backward(g_masked, want_dx=True, want_dw=False)
        found = {
            "y": source.output(x_masked @ self.w.t()),
            "dx": gradient.input_gradient(g_masked @ self.w),
            "w": self.sketch.compare("w", self.w),
        }
        for name, residual in found.items():
            self.worst[name] = max(self.worst[name], residual.ratio)

    def mark(self, x_masked: Tensor, g_masked: Tensor) -> dict:
        change, check, length = self.w - self.before, self.sketch.check, float(self.w.norm())
        m, d = self.w.shape
        per_update, without = {}, {}
        for name, rows, inner, width, effect in (
            ("y", x_masked, d, m, x_masked @ change.t()),
            ("dx", g_masked, m, d, g_masked @ change),
        ):
            lengths = rows.double().norm(dim=1)
            rounding = Rounding(inner, width, torch.float32, torch.float32)
            for kept, drifted in (per_update, lengths * check.drift), (without, None):
                # Differences of answers in full precision hardly count in their own tolerance.
                tolerance = rounding.error_norm(lengths * check.length, torch.zeros_like(lengths), drifted)
                kept[name] = float((effect.double().norm(dim=1) / tolerance).max()) / threshold(VECTORS)
        fetched = self.sketch.compare("w", self.before)
        ratio = max(per_update.values())
        relative = float(change.norm()) / length
        chances = {"0.5": unseen_ratio(1, VECTORS, 0.5), "0.99": unseen_ratio(1, VECTORS, 0.01)}
        found = {
            "honest": self.worst,
            "drift": check.drift / length,
            "true_drift": float((self.w - self.exact).norm()) / length,
            "moved": float((self.w - self.start).norm()) / float(self.start.norm()),
            "length_estimated": float(check.length) / length,
            "update": relative,
            "skipped_ratio": per_update,
            "skipped_ratio_without_drift": without,
            "skipped_ratio_when_fetched": fetched.ratio,
            "smallest_found": {chance: relative * wanted / ratio for chance, wanted in chances.items()},
            "smallest_found_when_fetched": {
                chance: wanted * fetched.tolerance / length for chance, wanted in chances.items()
            },
        }
        self.worst = dict.fromkeys(self.worst, 0.0)
        return found


def follow(m: int, d: int, steps: int) -> dict[str, dict[int, dict]]:
    """All rules over the same batches."""
    A, P = mask(d), mask(m)
    features = Masks(A=A, P=P)

    def masked(role: str, plain: Tensor, masks: Masks) -> Tensor:
        out = torch.empty_like(plain)
        masks.encode(role, plain, out)
        return out

    inputs, outputs = Features(d), Features(m)
    w = masked("w", inputs.rows(m) / d**0.5, features)
    runs = {name: Run(w, rule(**numbers)) for name, numbers in NUMBERS.items()}
    xs = [inputs.rows(ROWS).relu() for _ in range(POOL)]
    gs = [outputs.rows(ROWS) * torch.rand(ROWS, 1) ** 4 for _ in range(POOL)]
    size = RELATIVE * float(w.norm()) * 2**4 / float((gs[0].t() @ xs[0]).norm())
    marks = [n for n in (1, 10, 100, 1_000, 10_000) if n <= steps]
    marks += [steps] if steps not in marks else []
    found: dict[str, dict[int, dict]] = {name: {} for name in runs}
    for number in range(1, steps + 1):
        i, j, turn = (int(n) for n in torch.randint(POOL, (3,)))
        x, g = xs[i], gs[j].roll(turn, 0) * size
        masks = Masks(mask(ROWS), A, P)
        x_masked, g_masked = masked("x", x, masks), masked("g", g, masks)
        gradients = g_masked.t() @ x_masked, masked("dw", g.double().t() @ x.double(), features)
        for name, run in runs.items():
            run.update(x, g, masks, gradients)
            if number in marks or number % 100 == 0 or number < 10:
                run.check(x_masked, g_masked)
            if number in marks:
                found[name][number] = run.mark(x_masked, g_masked)
                show(f"{d} → {m}, {name}, {number}", found[name][number])
    return found


def show(label: str, found: dict) -> None:
    honest = ", ".join(f"{name} {ratio:.3f}" for name, ratio in found["honest"].items())
    least = ", ".join(f"{chance}: {update:.1e}" for chance, update in found["smallest_found"].items())
    print(
        f"{label}: honest {honest}; drift {found['drift']:.1e}, true {found['true_drift']:.1e}; an update of "
        f"{found['update']:.1e} left out {max(found['skipped_ratio'].values()):.1f}; least found {least}",
        flush=True,
    )


def cost(rows: int, d: int, m: int) -> dict[str, float]:
    """Thread time of the checks of a step, with a weight gradient that comes and with one that stays. Seconds."""
    x, g, w = torch.randn(rows, d), torch.randn(rows, m), torch.randn(m, d)
    masks = Masks(mask(rows), mask(d), mask(m))
    y, dx, dw, step = x @ w.t(), g @ w, g.t() @ x, rule(0.9, 0.005)
    times = defaultdict(list)
    sketch = Sketch(w, KEYS.fresh(0, "w"))

    def timed(name: str, action) -> None:
        start = time.thread_time()
        action()
        times[name].append(time.thread_time() - start)

    def today() -> None:
        source = WeightCheck(Linear(), w, KEYS.fresh(0, "w")).forward(x, KEYS.fresh(0, "x"), keep=True)
        gradient = source.backward(g, want_dx=True, want_dw=True)
        source.output(y), gradient.input_gradient(dx), gradient.weight_gradient(dw)

    def without() -> None:
        source = sketch.check.forward(x, KEYS.fresh(0, "x"), keep=False)
        gradient = source.backward(g, want_dx=True, want_dw=False)
        source.output(y), gradient.input_gradient(dx)

    for _ in range(9):
        timed("all checks, gradient comes", today)
        timed("output and input gradient alone", without)
        timed("accumulate", lambda: sketch.accumulate(x, g, masks))
        timed("update", lambda: sketch.update(step))
    return {name: sorted(took)[len(took) // 2] for name, took in times.items()}


def main(target: Path | None, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_heap()  # as every session does
    costs = {f"{rows}×{d} → {m}": cost(rows, d, m) for rows, d, m in COSTS}
    for name, seconds in costs.items():
        print(f"{name}: " + ", ".join(f"{part} {took * 1e3:.2f} ms" for part, took in seconds.items()))
    shapes = {name: follow(*shape, max(1, int(steps * share))) for name, (shape, share) in SHAPES.items()}
    if target is not None:
        kept = {"machine": machine(), "rows": ROWS, "vectors": VECTORS, "costs": costs, "shapes": shapes}
        target.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None, int(sys.argv[2]) if len(sys.argv) > 2 else 10_000)

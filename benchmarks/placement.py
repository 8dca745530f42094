"""How good the planner is: what it foretells beside what a call takes, how long it takes to measure, and what it costs
where nothing pays.

python benchmarks/placement.py [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import tempo
from tempo import schemes
from tempo.bench.measure import machine, null_session
from tempo.engine.costs import MeasuredCosts, sample
from tempo.engine.measure import measure
from tempo.engine.memory import keep_heap
from tempo.schemes.base import Scheme
from tempo.settings import parse
from tempo.wire.messages import Conv, Linear, Product

REPEATS = 15
WIRE = 3e9
"""Bytes per second each way, for `directions`."""
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 768 → 3072, 4,160 rows": (lambda: nn.Linear(768, 3072), (4160, 768)),
    "linear 768 → 768, 4,160 rows": (lambda: nn.Linear(768, 768), (4160, 768)),
    "linear 768 → 768, 256 rows": (lambda: nn.Linear(768, 768), (256, 768)),
    "linear 256 → 256, 4,160 rows": (lambda: nn.Linear(256, 256), (4160, 256)),
    "linear 64 → 64, 4,096 rows": (lambda: nn.Linear(64, 64), (4096, 64)),
    "linear 64 → 64, 64 rows": (lambda: nn.Linear(64, 64), (64, 64)),
    "conv 3×3, 64 channels, 32 × 32×32": (lambda: nn.Conv2d(64, 64, 3, padding=1), (32, 64, 32, 32)),
    "conv 3×3, 256 channels, 32 × 8×8": (lambda: nn.Conv2d(256, 256, 3, padding=1), (32, 256, 8, 8)),
}
NOTHING_PAYS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron, 64 wide, batch 32": (
        lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)),
        (32, 64),
    ),
    "encoder layer, 64 wide, 8 × 16 tokens": (
        lambda: nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True),
        (8, 16, 64),
    ),
    "convolutions, 16 channels, 8 × 16×16": (
        lambda: nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)),
        (8, 16, 16, 16),
    ),
}


def step(model: nn.Module, x: Tensor, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one forward and backward pass."""
    started = clock()
    model.zero_grad()
    y = model(x)
    y.backward(torch.ones_like(y))
    return clock() - started


def starting() -> dict[str, Any]:
    """What a session measures: links and workers at its start, then each class of layer of `LAYERS` when it is met.

    Seconds that pass, and those of them that this process computes: on a busy machine it waits between.
    """
    found: dict[str, Any] = {"classes": len({sample(*_product(make(), shape)) for make, shape in LAYERS.values()})}
    with tempo.connect(base="secret", local_threads=1) as session:
        (link,) = session._engine.links
        found["probes"] = _took(lambda: measure(link))
    for name in ("tempo", "mix", "mix-tuned"):
        scheme, costs = schemes.create(name), MeasuredCosts("auto", ["one"])

        def all_classes(scheme: Scheme = scheme, costs: MeasuredCosts = costs) -> None:
            for make, shape in LAYERS.values():
                costs.rates(scheme, *_product(make(), shape), torch.float32)

        found[name] = _took(all_classes)
    return found


def _product(layer: nn.Module, x: tuple[int, ...]) -> tuple[Product, tuple[int, ...], tuple[int, ...]]:
    kind = Linear() if isinstance(layer, nn.Linear) else Conv((1, 1), (1, 1), (1, 1), 1)
    return kind, x, tuple(layer.get_parameter("weight").shape)


def _took(run: Callable[[], object]) -> dict[str, float]:
    started, computed = time.perf_counter(), time.thread_time()
    run()
    return {"s": time.perf_counter() - started, "computing_s": time.thread_time() - computed}


def foretold(scheme: str) -> list[dict[str, Any]]:
    """Per layer: what it takes here and through a null worker, as estimated and as measured."""
    found = []
    with null_session(parse({"scheme": scheme, "base": "secret", "placement": "auto", "local_threads": 1})) as session:
        planner = session._engine.planner
        for name, (make, shape) in LAYERS.items():
            plain = make()
            model, x = copy.deepcopy(plain), torch.randn(shape, requires_grad=True)
            planner.placement = "auto"
            session.protect(model, offload=["*"])
            model(x)  # places it, whatever the decision
            (decision,) = list(planner._decisions.values())[-1:]
            planner.placement = "all"
            times: dict[str, list[float]] = {"here": [], "out": []}
            for _ in range(REPEATS + 2):
                with torch.no_grad():
                    model.weight.add_(1e-9)  # as an optimizer would: the weight goes out again
                times["here"].append(step(plain, x))
                times["out"].append(step(model, x))
            session.unprotect(model)
            told = decision.estimate
            if told is None:
                raise SystemExit(f"{name}: {decision.reason}")
            found.append(
                {
                    "layer": name,
                    "offloaded": decision.offload,
                    "here": {"told_ms": told.saved * 1e3, "ms": median(times["here"][2:]) * 1e3},
                    "out": {"told_ms": told.cost * 1e3, "ms": median(times["out"][2:]) * 1e3},
                    "of_which": {"mask_ms": told.mask * 1e3, "check_ms": told.check * 1e3, "wire_ms": told.wire * 1e3},
                }
            )
    return found


def overhead() -> list[dict[str, Any]]:
    """Models of which nothing goes out: a step under a session over a plain one, by the medians of blocks of steps,
    in this thread's own time.
    """
    found = []
    with tempo.connect(base="secret", local_threads=1) as session:
        for name, (make, shape) in NOTHING_PAYS.items():
            plain = make()
            model, x = session.protect(copy.deepcopy(plain), offload=["*"]), torch.randn(shape)
            blocks: dict[str, list[float]] = {"plain": [], "protected": []}
            for _ in range(REPEATS):
                for which, network in (("plain", plain), ("protected", model)):
                    blocks[which].append(median(step(network, x, time.thread_time) for _ in range(50)))
            if session.summary().offloaded_share:
                raise SystemExit(f"{name}: something went out")
            ratio = median(b / a for a, b in zip(blocks["plain"], blocks["protected"], strict=True))
            found.append({"model": name, "plain_ms": median(blocks["plain"]) * 1e3, "ratio": ratio})
            session.unprotect(model)
    return found


def directions(scheme: str) -> dict[str, Any]:
    """What deciding per direction would gain over a grid of layers: where more than 5%, and the most."""
    costs = MeasuredCosts("auto", ["one"])
    prices = costs.rates(schemes.create(scheme), Linear(), (4096, 512), (512, 512), torch.float32)
    element = {name: prices.mask[name] + prices.check[name] + 4 / WIRE for name in prices.mask}
    gains = []
    for rows, d, m in product(*[[64 << i for i in range(7)]] * 3):
        one_pass = 2 * rows * d * m * prices.flop
        forward = rows * (d * element["x"] + m * element["y"]) + d * m * element["w"]
        g, dx, dw = rows * m * element["g"], rows * d * element["dx"], d * m * element["dw"]
        whole = min(3 * one_pass, forward + g + dx + dw)
        parted = min(forward + g + dx + one_pass, forward + g + dw + one_pass, forward + 2 * one_pass)
        gains.append((whole / parted, rows, d, m))
    return {"gains": sum(gain > 1.05 for gain, *_ in gains) / len(gains), "most": max(gains)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, help="Write the figures here, too.")
    file = arguments.parse_args().json
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_heap()
    results: dict[str, Any] = {"machine": machine(), "starting": starting(), "foretold": {}, "directions": {}}
    for what, took in results["starting"].items():
        if what != "classes":
            print(f"measuring {what}: {took['s']:.2f} s, of which {took['computing_s']:.2f} s computing")
    for scheme in ("tempo", "mix"):
        results["foretold"][scheme] = foretold(scheme)
        results["directions"][scheme] = found = directions(scheme)
        print(f"{scheme}: deciding per direction gains over 5% in {found['gains']:.1%} of a grid; most {found['most']}")
        for line in results["foretold"][scheme]:
            here, out = line["here"], line["out"]
            print(
                f"{scheme:6} {line['layer']:36} here {here['told_ms']:8.2f} told, {here['ms']:8.2f} ms; "
                f"out {out['told_ms']:8.2f} told, {out['ms']:8.2f} ms {'goes' if line['offloaded'] else 'stays'}"
            )
    results["nothing_pays"] = overhead()
    for line in results["nothing_pays"]:
        print(f"{line['model']:40} plain {line['plain_ms']:.3f} ms, protected {line['ratio']:.3f} of it")
    if file is not None:
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

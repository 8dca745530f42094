"""What the wire's dtype does to a whole training run: losses and accuracy beside plain PyTorch's, by scheme and dtype.

A small ViT on scikit-learn's digits, AdamW, from the same weights with the same batches in every run of a seed.
Differences from the plain run of the same seed are given as mean and spread over seeds. The control is a plain run
whose images stand in another order within each batch, so that it differs in rounding alone.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/wire/accuracy.py [FILE.json] [EPOCHS] [SEEDS]
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import tempo
from tempo.bench.measure import machine
from tempo.recipes import data
from tempo.recipes.models import VitSmall, logits
from tempo.session import Session

BATCH = 64
MODEL = VitSmall(width=32, depth=2, heads=2, mlp=64, patch=2)
SCHEMES = {"mix": ("int8", "bfloat16"), "tempo-signed": ("int8",), "tempo": ("int8", "bfloat16")}


def train(
    model: nn.Module, seed: int, epochs: int, session: Session | None = None, reverse: bool = False
) -> dict[str, Any]:
    """Losses of every step, accuracy on the test set after the last, bytes on the wire."""
    source = data.load("digits")
    images, order = source.format(), data.Order(len(source.train), BATCH, seed)
    before = None
    if session is not None:
        session.protect(model, base="secret")
        before = session.stats()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    model.train()
    losses = []
    for _ in range(epochs * (len(source.train) // BATCH)):
        chosen = order.batch().flip(0) if reverse else order.batch()
        order.advance()
        x, labels = images.numbers(source.train.images[chosen]), source.train.labels[chosen]
        loss = F.cross_entropy(logits(model, x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found: dict[str, Any] = {"losses": losses}
    if session is not None and before is not None:
        spent = session.stats() - before
        if not spent.flops_offloaded:
            raise SystemExit("nothing was offloaded, so this compares nothing")
        found |= {"bytes_sent": spent.bytes_sent, "bytes_received": spent.bytes_received}
        session.unprotect(model)
    model.eval()
    with torch.no_grad():
        right = logits(model, images.numbers(source.test.images)).argmax(1) == source.test.labels
    return found | {"accuracy": right.double().mean().item()}


def against(run: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """How a run differs from the plain one: over all steps, in the last epoch, on the test set."""
    ours, theirs = (torch.tensor(r["losses"], dtype=torch.float64) for r in (run, plain))
    return {
        "loss_apart": float((ours - theirs).abs().mean()),
        "last_loss": float(ours[-22:].mean()),
        "last_loss_more": float(ours[-22:].mean() - theirs[-22:].mean()),
        "accuracy": run["accuracy"],
        "accuracy_more": run["accuracy"] - plain["accuracy"],
    }


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Mean over seeds, and each of them."""
    return {
        key: {"mean": statistics.fmean(row[key] for row in rows), "each": [round(row[key], 5) for row in rows]}
        for key in rows[0]
    }


def main(target: Path | None, epochs: int, seeds: int) -> None:
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, float]]] = {}
    curves: dict[str, list[list[float]]] = {}
    sizes: dict[str, dict[str, int]] = {}

    def note(name: str, run: dict[str, Any], plain: dict[str, Any], began: float) -> None:
        rows.setdefault(name, []).append(against(run, plain))
        curves.setdefault(name, []).append([round(loss, 4) for loss in run["losses"]])
        sizes[name] = {key: run[key] for key in ("bytes_sent", "bytes_received") if key in run}
        print(f"{name}: {rows[name][-1]}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if target is not None:  # what there is by now, should it be interrupted
            about = {"epochs": epochs, "batch": BATCH, "machine": machine()}
            results = {name: summary(found) | sizes[name] for name, found in rows.items()}
            target.write_text(json.dumps({"config": about, "results": results, "curves": curves}) + "\n")

    for seed in range(seeds):
        torch.manual_seed(seed)
        start = MODEL.build(1, 8, 10)
        began = time.perf_counter()
        plain = train(copy.deepcopy(start), seed, epochs)
        note("plain", plain, plain, began)
        note("plain, other order", train(copy.deepcopy(start), seed, epochs, reverse=True), plain, began)
        for scheme, dtypes in SCHEMES.items():
            for dtype in dtypes:
                began = time.perf_counter()
                fields = {"scheme": scheme, "wire_dtype": dtype, "base": "secret", "verify": "off"}
                with tempo.connect(placement="all", local_threads=1, **fields) as session:
                    note(f"{scheme}, {dtype}", train(copy.deepcopy(start), seed, epochs, session), plain, began)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        Path(arguments[0]) if arguments else None,
        int(arguments[1]) if len(arguments) > 1 else 5,
        int(arguments[2]) if len(arguments) > 2 else 3,
    )

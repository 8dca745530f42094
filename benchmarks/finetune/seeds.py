"""Whether LoRA under scheme `split` learns what plain LoRA learns, paired over seeds, on one of two workloads:

* ``minilm``, what `examples/minilm` trains: which play a speech is from;
* ``shakespeare``, what `examples/shakespeare` trains: the next token of a play, on a base that
  ``python examples/shakespeare/make_base.py --out runs/shakespeare`` makes.

Trains without Tempo on the float32 base and on the base rounded to integers, and under `split`, which rounds it so
itself. Runs of one seed start from the same adapters and see the same rows in the same order under the same dropout.
The controls are the integers of the default bits again: with two threads, and in float64, which shows how far
float32's own rounding moves a run.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/finetune/seeds.py minilm FILE.json
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/finetune/seeds.py shakespeare FILE.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from scipy import stats
from torch import nn

import tempo
from tempo.bench.measure import machine
from tempo.recipes.finetune.job import Job, evaluate, one_step
from tempo.recipes.finetune.tuning import parse
from tempo.session import Session
from tempo.settings import Settings
from tempo.wire.integers import integers

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "minilm"))
import which_play as example

DEFAULT = Settings().split_weight_bits
RELATIVE, FLOOR = 1e-4, 1e-6
"""The rule for same numbers: how far the losses of one step may be apart."""

Run = dict[str, Any]
"""``losses`` of every step; ``loss`` and ``accuracy`` on what was kept apart."""


class Workload(ABC):
    """A model with adapters that a seed draws, and how it is trained and measured: both anew for every run."""

    setup: ClassVar[dict[str, Any]]
    """What was trained, for the record."""

    model: nn.Module

    @abstractmethod
    def __init__(self, seed: int) -> None: ...

    @abstractmethod
    def learn(self) -> Run:
        """Train the model, and measure it."""


@final
class MiniLM(Workload):
    """Speeches of four plays."""

    epochs = 1
    setup: ClassVar[dict[str, Any]] = {
        "epochs": epochs,
        "classes": len(example.PLAYS),
        **{name: getattr(example, name.upper()) for name in ("tokens", "batch", "rank", "rate")},
    }

    def __init__(self, seed: int) -> None:
        self.seed, self.model = seed, example.adapted(seed)

    @staticmethod
    @cache
    def rows() -> tuple[example.Rows, example.Rows]:
        """To train on, and kept apart."""
        return example.speeches(Path(os.environ.get("TEMPO_DATA", ".")) / "text" / "tinyshakespeare.txt")

    def learn(self) -> Run:
        """As the example does."""
        training, apart = self.rows()
        losses = example.train(self.model, training, self.seed, self.epochs)
        loss, accuracy = example.measure(self.model, apart)
        return {"losses": losses, "loss": loss, "accuracy": accuracy}


@final
class Shakespeare(Workload):
    """A play; which of its passages are kept apart is drawn by the seed as well."""

    folder = Path("runs/shakespeare")
    setup: ClassVar[dict[str, Any]] = {
        "data": {"validation": 0.2, "length": 128, "batch_size": 4},
        "optimizer": {"lr": 2e-3},
        "run": {"epochs": 1},
    }

    def __init__(self, seed: int) -> None:
        values = {
            **self.setup,
            "model": {"base": str(self.folder / "base")},
            "data": {**self.setup["data"], "file": str(self.folder / "tempest.jsonl")},
            "run": {**self.setup["run"], "seed": seed},
        }
        self.job = Job(parse(values, "seeds.py"), None)
        self.model = self.job.model

    def learn(self) -> Run:
        """As `tempo finetune` does."""
        losses = [one_step(self.job, time.perf_counter()).loss for _ in range(self.job.steps)]
        loss, accuracy = evaluate(self.job, lambda: False)
        return {"losses": losses, "loss": loss, "accuracy": accuracy}


WORKLOADS: dict[str, type[Workload]] = {"minilm": MiniLM, "shakespeare": Shakespeare}


def rounded(workload: Workload, bits: int) -> Workload:
    """The same with integers times scales for frozen weights, as `split` has them; embeddings tied to one stay."""
    for module in workload.model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            weight_q, scales = integers(module.weight, bits)
            module.weight = nn.Parameter(weight_q * scales, requires_grad=False)
    return workload


def shared(session: Session, workload: Workload) -> Run:
    """A run under scheme `split`; with ``share_offloaded``, of the FLOPs of linear layers."""
    before = session.stats()
    session.protect(workload.model)
    found = workload.learn()
    used = session.stats() - before
    session.unprotect(workload.model)
    if not used.flops_offloaded:
        raise RuntimeError("nothing went to workers: the comparison would be of plain PyTorch with itself")
    return {**found, "share_offloaded": used.flops_offloaded / (used.flops_offloaded + used.flops_trusted)}


def compare(workload: str, bits: Sequence[int], seed: int) -> dict[str, Run]:
    """Every kind of run from one start."""
    torch.set_num_threads(1)
    kind = WORKLOADS[workload]
    found = {"plain, float32": kind(seed).learn()}
    for count in bits:
        found[f"plain, {count} bits"] = rounded(kind(seed), count).learn()
        with tempo.connect(
            scheme="split", base="public", placement="all", local_threads=1, split_weight_bits=count
        ) as session:
            found[f"split, {count} bits"] = shared(session, kind(seed))
    torch.set_num_threads(2)
    found["two threads"] = rounded(kind(seed), DEFAULT).learn()
    torch.set_num_threads(1)
    double = rounded(kind(seed), DEFAULT)
    double.model.double()
    found["float64"] = double.learn()
    return found


def mean(values: Sequence[float]) -> dict[str, float]:
    """The mean, and how far its 95% interval reaches either way (Student's t; two values at least)."""
    reach = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else float("nan")
    return {"mean": float(torch.tensor(values).double().mean()), "reach": float(reach)}


def paired(runs: Sequence[dict[str, Run]], one: str, other: str) -> dict[str, Any]:
    """How ``one`` differs from ``other``, over seeds."""
    pairs = [(found[one], found[other]) for found in runs]
    apart = [abs(a - b) / max(b, FLOOR / RELATIVE) for x, y in pairs for a, b in zip(x["losses"], y["losses"])]
    ends = [x["loss"] / y["loss"] - 1 for x, y in pairs]
    return {
        "of": one,
        "against": other,
        "loss_relative": mean(ends),
        "largest_of_an_end": max(map(abs, ends)),
        "accuracy": mean([x["accuracy"] - y["accuracy"] for x, y in pairs]),
        "largest_of_a_step": max(apart),
        "largest_of_first_step": max(abs(x["losses"][0] / y["losses"][0] - 1) for x, y in pairs),
        "steps_within_rule": sum(a <= RELATIVE for a in apart) / len(apart),
    }


def pairs(runs: Sequence[dict[str, Run]], bits: Sequence[int]) -> list[dict[str, Any]]:
    """All that is compared: next to the same integers, and to float32."""
    same = [(f"split, {count} bits", f"plain, {count} bits") for count in bits]
    controls = [(control, f"plain, {DEFAULT} bits") for control in ("two threads", "float64")]
    float32 = [(f"{kind}, {count} bits", "plain, float32") for kind in ("split", "plain") for count in bits]
    return [paired(runs, *names) for names in (*same, *controls, *float32)]


def show(runs: Sequence[dict[str, Run]], compared: Sequence[dict[str, Any]]) -> None:
    """Both tables, as docs/finetune.md has them."""
    kinds = [name for name in runs[0] if "," in name]
    lines = [["seed", *kinds], ["---"] * (len(kinds) + 1)]
    for seed, found in enumerate(runs):
        lines.append([str(seed), *(f"{found[name]['loss']:.4f}, {found[name]['accuracy']:.1%}" for name in kinds)])
    lines += [[], ["runs", "against", "loss", "furthest seed", "accuracy, points", "furthest step", "within 1e-4"]]
    lines.append(["---"] * 7)
    for one in compared:
        loss, accuracy = one["loss_relative"], one["accuracy"]
        lines.append(
            [
                one["of"],
                one["against"],
                f"{loss['mean']:+.4%} ± {loss['reach']:.4%}",
                f"{one['largest_of_an_end']:.4%}",
                f"{100 * accuracy['mean']:+.2f} ± {100 * accuracy['reach']:.2f}",
                f"{one['largest_of_a_step']:.1e}",
                f"{one['steps_within_rule']:.0%}",
            ]
        )
    print(*(f"| {' | '.join(cells)} |" if cells else "" for cells in lines), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("file", type=Path, nargs="?", help="where to keep all figures")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bits", type=int, nargs="*", default=[], help=f"to compare besides {DEFAULT}, the default")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    arguments = parser.parse_args()
    bits = list(dict.fromkeys([DEFAULT, *arguments.bits]))
    versions = {name: version(name) for name in ("peft", "transformers")}
    setup = {**versions, **WORKLOADS[arguments.workload].setup}
    runs: list[dict[str, Run]] = []
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for found in pool.map(partial(compare, arguments.workload, bits), range(arguments.seeds)):
            runs.append(found)
            compared = pairs(runs, bits)
            show(runs, compared)
            if arguments.file:
                kept = {"machine": machine(), "setup": setup, "pairs": compared, "seeds": runs}
                arguments.file.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()

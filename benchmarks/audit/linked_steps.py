"""Fresh masks at every step, linked by the weights: do they protect like fresh ones, or like one mask reused?

A layer is trained; each step has fresh masks. The worker links its masks over steps (attack `gradients_joint`), brings
all it saw into the frame of the first step, and separates features by FastICA over all of it. With and without a cloak
on the weight. Usage:

    OMP_NUM_THREADS=1 python benchmarks/audit/linked_steps.py linked-steps.json
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempo.audit import lab
from tempo.audit.attack import Curve
from tempo.audit.attacks.gradients_joint import link
from tempo.audit.report.contents import Report, write
from tempo.audit.solvers.unmixing import fast_ica, features_masked, flat, mean_best_correlation
from tempo.bench.measure import machine
from tempo.schemes.mix import Mix

WIDTH = 64
ROWS = 1024
STEPS = [1, 2, 4, 8, 16, 24]
CLOAKS = (0, 4, 16)


def trained(cloak: int, optimizer: str) -> lab.Lab:
    """A layer trained on independent sparse features of different strength."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 10))
    generator = torch.Generator().manual_seed(0)
    strength = torch.linspace(0.5, 1.5, WIDTH)
    uniform = torch.rand(STEPS[-1], ROWS, WIDTH, generator=generator).clamp_min(1e-12)
    x = -uniform.log() * strength
    labels = torch.randint(10, (STEPS[-1], ROWS), generator=generator)
    if optimizer == "SGD":
        chosen: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 0.05)
    else:
        chosen = torch.optim.AdamW(model.parameters(), 1e-3)
    return lab.train(
        model,
        list(zip(x, labels, strict=True)),
        lambda m, inputs, targets: F.cross_entropy(m(inputs), targets),
        optimizer=chosen,
        trusted=("2",),
        masks=Mix(cloak=cloak, insecure_small_blocks=True),
    )


def gathered(opened: lab.Lab) -> list[Tensor]:
    """Masked inputs of every step, in the frame of the first."""
    calls = opened.views[0].calls
    relation = torch.eye(WIDTH, dtype=torch.float64)
    found = [flat(calls[0].x)]
    for last, following in pairwise(calls):
        relation = link([last], [following]).A @ relation  # A_next A_firstᵀ
        found.append(flat(following.x) @ relation)
    return found


def separated(opened: lab.Lab, rows: list[Tensor]) -> float:
    known = opened.truth().of(opened.views[0].calls[0])
    matrix = fast_ica(torch.cat(rows), 100)
    return mean_best_correlation(flat(known["x"]), flat(features_masked(known)) @ matrix)


def main(target: Path) -> None:
    torch.set_num_threads(1)
    series: dict[str, list[float | None]] = {}
    for optimizer in ("SGD", "AdamW"):
        for cloak in CLOAKS:
            opened = trained(cloak, optimizer)
            rows = gathered(opened)
            name = f"{optimizer}, {f'cloak of rank {cloak}' if cloak else 'no cloak'}"
            series[name] = [separated(opened, rows[:steps]) for steps in STEPS]
            print(name, [f"{value:.2f}" for value in series[name] if value is not None], flush=True)
    curve = Curve(
        title="Fresh masks linked over steps, then separated by ICA",
        x_label=f"steps of {ROWS} rows",
        y_label="mean best correlation with a plain feature",
        x=[float(steps) for steps in STEPS],
        series=series,
        leaks=0.65,
        note=f"{WIDTH} independent features of excess kurtosis 6, one round in blocks of 32, rows in blocks of 32, all "
        "masks fresh at every step. The attacker knows nothing but the transcript.",
    )
    command = "python benchmarks/audit/linked_steps.py linked-steps.json"
    write(Report(runs=[], curves=[curve], command=command, machine=machine()), target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

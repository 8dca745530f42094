"""Sparse frames on weights that were trained and then fine-tuned here: attention, MLP and convolutions, over blocks.

A vision transformer and a residual network are trained from random weights on one part of the digits (the public base)
and fine-tuned on another (the secret), as `tempo audit --run` does. Then every weight is masked by one round of blocks,
with and without the scheme's own cloak, and attacked by who knows the base. Convolutions go out as they are (taps under
one pair of masks) and unfolded (channels × taps, all mixed). Usage:

    OMP_NUM_THREADS=1 python benchmarks/audit/trained.py trained.json
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from sparse_frame import CAP, mask
from torch import Tensor

from tempo.audit import rehearsal
from tempo.audit.attack import Curve
from tempo.audit.report.contents import Report, write
from tempo.audit.solvers import blockwise, frames
from tempo.audit.solvers.frames import as_taps
from tempo.bench.measure import machine
from tempo.keys import KeySchedule
from tempo.recipes import recipe
from tempo.schemes import cloak
from tempo.wire.messages import Linear

EXAMPLES = Path(__file__).parents[2] / "examples"
BLOCKS = [4, 8, 16, 32]
RANK = 16
WEIGHTS = {
    "audit_vit.toml": {
        "ViT, query": "vit.layers.0.attention.q_proj.weight",
        "ViT, MLP": "vit.layers.1.mlp.fc1.weight",
    },
    "audit_resnet.toml": {
        "ResNet, 3×3": "resnet.encoder.stages.1.layers.0.layer.1.convolution.weight",
    },
}


def attack(base: Tensor, w: Tensor, block: int, rank: int) -> float:
    """Delta error of who knows ``base`` (m×d×taps) and sees ``w`` under blocks of ``block`` and a cloak of ``rank``."""
    keys = KeySchedule()
    flat = w.flatten(1)
    sent = w
    if rank:
        drawn = cloak.draw(keys.fresh(0, "w").stream("cloak"), Linear(), flat, rank)
        sent = drawn.cover(flat).reshape(w.shape)
    p, a = mask(w.shape[0], block, 1, keys), mask(w.shape[1], block, 1, keys)
    masked = torch.einsum("mn,ndt,ed->met", p, sent, a)
    best = None
    for band in (0.0, 0.03) if rank else (0.0,):
        found = blockwise.solve_one_round(masked, base, frames.start(masked, base, band), block, cloak=rank)
        if best is None or found.residual < best.residual:
            best = found
    assert best is not None  # noqa: S101 - at least one band was tried
    return min(float((best.w - w).norm() / (w - base).norm()), CAP)


def subjects() -> dict[str, tuple[Tensor, Tensor]]:
    """Base and fine-tuned weight of each kind, m×d×taps."""
    found = {}
    for file, names in WEIGHTS.items():
        start = rehearsal.Rehearsal(recipe.load(EXAMPLES / file, {}), "full").start("public")
        assert start.base is not None  # noqa: S101 - a public origin has one
        for title, name in names.items():
            base, w = as_taps(start.base[name]), as_taps(start.model.get_parameter(name).detach())
            drift = float((w - base).norm() / base.norm())
            found[f"{title} ({w.shape[0]}×{w.shape[1]}, drift {drift:.1%})"] = base, w
            if w.shape[2] > 1:
                wide = w.shape[1] * w.shape[2]
                unfolded = f"{title} unfolded ({w.shape[0]}×{wide}, drift {drift:.1%})"
                found[unfolded] = base.flatten(1)[:, :, None], w.flatten(1)[:, :, None]
    return found


def main(target: Path) -> None:
    torch.set_num_threads(1)
    begun, curves, weights = time.perf_counter(), [], subjects()
    for rank in (0, RANK):
        series: dict[str, list[float | None]] = {}
        for title, (base, w) in weights.items():
            usable = [block for block in BLOCKS if block <= min(w.shape[:2])]
            series[title] = [attack(base, w, block, rank) if block in usable else None for block in BLOCKS]
            print(f"cloak {rank}, {title}: {series[title]}", flush=True)
        curves.append(
            Curve(
                title=f"Trained weights, one round, {f'cloak of rank {rank}' if rank else 'no cloak'}",
                x_label="block size",
                y_label="delta error",
                x=[float(block) for block in BLOCKS],
                series=series,
                leaks=0.9,
                higher_leaks=False,
                note="Trained on some of the digits, fine-tuned on others. One call; knowing the base alone gives 1.",
            )
        )
    command = "python benchmarks/audit/trained.py trained.json"
    seconds = time.perf_counter() - begun
    write(Report(runs=[], curves=curves, command=command, machine=machine(), seconds=seconds), target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

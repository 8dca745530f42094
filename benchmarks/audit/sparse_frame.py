"""Sweep the sparse-frame family over block size, rounds, cloak and drift: `python benchmarks/audit/sparse_frame.py`.

Prints every point and keeps the curves, as a report of the audit, in ``--json FILE`` after each of them. Weights are
attacked one by one, outside any session: masks come from the scheme's own `draw_blocks`, cloaks have equal singular
values of a given strength beside the root mean square one of the weight. One seed per point: a curve that jumps at a
single point shows luck, one that jumps and stays shows a threshold.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tempo.audit.attack import Curve
from tempo.audit.report.contents import Report, write
from tempo.audit.solvers import blockwise, frames
from tempo.audit.solvers.frames import as_taps
from tempo.keys import KeySchedule
from tempo.schemes import cloak
from tempo.schemes.masks import Form, draw_blocks
from tempo.schemes.sandwich import sandwich
from tempo.wire.messages import Linear

LEAKS = 0.9
CAP = 2.0
"""Delta errors are cut here: all above mean that wrong masks were found."""


def synthetic(width: int) -> Tensor:
    """A square weight with a power-law spectrum, as trained ones have."""
    generator = torch.Generator().manual_seed(width)
    u, v = (torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    return (u * torch.arange(1, width + 1, dtype=torch.float64) ** -0.5) @ v.T


def mask(features: int, block: int, rounds: int, keys: KeySchedule) -> Tensor:
    """A mask of the scheme, dense."""
    operator = draw_blocks(keys.fresh(0, "w").stream("A"), features, block, rounds, 1.0).operator(Form.PLAIN)
    matrix = torch.empty(features, features, dtype=torch.float64)
    sandwich(torch.eye(features, dtype=torch.float64), operator, None, [matrix])
    return matrix


def attack(
    base: Tensor,
    block: int,
    rounds: int,
    drift: float,
    rank: int = 0,
    strength: float = 0.0,
    bands: tuple[float, ...] = (0.0,),
) -> tuple[float, float]:
    """Mask a drifted weight, attack it, and return delta error and row correlation of the start."""
    size, keys = len(base), KeySchedule()
    generator = torch.Generator().manual_seed(block + 1000 * rounds)
    change = torch.randn(base.shape, generator=generator, dtype=torch.float64)
    change *= drift * base.norm() / change.norm()
    w = base + change
    low_rank = torch.zeros_like(w)
    if rank:
        u, v = (torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q for _ in range(2))
        low_rank = strength * base.norm() / size**0.5 * u @ v.T
    p, a = mask(size, block, rounds, keys), mask(size, block, rounds, keys)
    masked, public = as_taps(p @ (w + low_rank) @ a.T), as_taps(base)
    solve = blockwise.solve_one_round if rounds == 1 else blockwise.solve_two_rounds
    found = []
    for band in bands:
        start = frames.start(masked, public, band)
        solution = solve(masked, public, start, block, cloak=rank)
        correlation = abs(float(torch.nn.functional.cosine_similarity(start.a, a, dim=1).mean()))
        found.append((solution.residual, float((solution.w[:, :, 0] - w).norm() / change.norm()), correlation))
    _, error, correlation = min(found)
    return min(error, CAP), correlation


def steps(base: Tensor, block: int, drift: float, count: int) -> float:
    """Delta error from ``count`` steps of one weight under fresh one-round masks."""
    generator, keys = torch.Generator().manual_seed(block), KeySchedule()
    change = torch.randn(base.shape, generator=generator, dtype=torch.float64)
    change *= drift * base.norm() / change.norm()
    public, found = as_taps(base), []
    for _ in range(count):
        p, a = (mask(len(base), block, 1, keys) for _ in range(2))
        masked = as_taps(p @ (base + change) @ a.T)
        found.append((masked, blockwise.solve_one_round(masked, public, frames.start(masked, public), block)))
    reference = public
    for _ in range(8 if count > 1 else 0):
        found = [(masked, blockwise.refit(masked, reference, *each.structures, 0, 4)) for masked, each in found]
        reference = torch.stack([each.w for _, each in found]).mean(0)
    w = reference if count > 1 else found[0][1].w
    error = min(float((w[:, :, 0] - base - change).norm() / change.norm()), CAP)
    print(json.dumps({"point": f"{count} steps, blocks of {block}", "delta error": round(error, 3)}), flush=True)
    return error


def first(width: int, strength: float) -> float:
    """Row correlation of the start under two rounds of 32 and the cloak that the scheme draws."""
    base, keys, generator = synthetic(width), KeySchedule(), torch.Generator().manual_seed(width)
    change = torch.randn(base.shape, generator=generator, dtype=torch.float64)
    w = base + change * (0.005 * base.norm() / change.norm())
    drawn = cloak.draw(keys.fresh(0, "w").stream("cloak"), Linear(), w, 16, strength)
    p, a = (mask(width, 32, 2, keys) for _ in range(2))
    start = frames.start(as_taps(p @ drawn.cover(w).double() @ a.T), as_taps(base))
    correlation = abs(float(torch.nn.functional.cosine_similarity(start.a, a, dim=1).mean()))
    print(json.dumps({"point": f"width {width}, strength {strength}", "start": round(correlation, 3)}), flush=True)
    return correlation


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, help="safetensors file of a public checkpoint; synthetic without")
    parser.add_argument("--name", default="", help="of a square weight in it")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--part", choices=("blocks", "steps", "width"), default="blocks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole = load_file(options.weights)[options.name].double() if options.weights else None
    origin = f"{options.name} of a pretrained network" if options.weights else "a random weight with power-law spectrum"
    curves: list[Curve] = []
    started = time.perf_counter()

    def weight(width: int) -> Tensor:
        return synthetic(width) if whole is None else whole[:width, :width]

    def keep(
        title: str,
        x_label: str,
        x: Sequence[float],
        series: dict[str, list[float | None]],
        note: str,
        y_label: str = "delta error",
    ) -> None:
        leaks = LEAKS if y_label == "delta error" else None
        curves.append(
            Curve(title=title, x_label=x_label, y_label=y_label, x=list(x), series=series, leaks=leaks, note=note)
        )
        weights = f" --weights FILE --name {options.name}" if options.weights else ""
        command = f"python benchmarks/audit/sparse_frame.py --part {options.part}{weights}"
        machine = {
            "processor": next(
                (
                    line.split(":")[1].strip()
                    for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")
                ),
                platform.machine(),
            ),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "threads": "1",
        }
        write(
            Report(runs=[], curves=curves, command=command, machine=machine, seconds=time.perf_counter() - started),
            options.json,
        )

    def point(label: str, *arguments: object) -> float:
        begun = time.process_time()
        error, correlation = attack(*arguments)  # type: ignore[arg-type]
        print(
            json.dumps(
                {
                    "point": label,
                    "delta error": round(error, 3),
                    "start": round(correlation, 3),
                    "seconds": round(time.process_time() - begun, 1),
                }
            ),
            flush=True,
        )
        return error

    if options.part == "steps":
        counts = [1, 4, 16]
        series = {
            f"blocks of {block}": [steps(weight(96), block, 0.02, count) for count in counts] for block in (16, 32)
        }
        keep("Steps under fresh masks, one round, 2% drift", "steps", counts, series, f"width 96, {origin}")
        return

    if options.part == "width":
        widths, strengths = [384, 768, 1024], (0.5, 1.0)
        series = {f"strength {strength}": [first(width, strength) for width in widths] for strength in strengths}
        keep(
            "Two rounds of 32 under the scheme's own cloak of rank 16, 0.5% drift: how right the attack's start is",
            "width",
            widths,
            series,
            "row correlation of the start with the true mask; random weights with power-law spectrum",
            "row correlation",
        )
        return

    base = weight(256)
    series: dict[str, list[float | None]] = {}
    for strength in (0.25, 0.5, 1.0):
        series[f"strength {strength}"] = [
            point(f"two rounds, cloak {rank} × {strength}", base, 32, 2, 0.005, rank, strength) for rank in (4, 16)
        ]
    keep(
        "Two rounds and a cloak, blocks of 32, 0.5% drift", "rank of the cloak", [4, 16], series, f"width 256, {origin}"
    )

    drifts = [0.005, 0.02, 0.05, 0.1]
    series = {
        f"one round, blocks of {block}": [
            point(f"one round of {block}, drift {drift}", weight(192), block, 1, drift) for drift in drifts
        ]
        for block in (4, 8, 16, 32, 64)
    }
    series |= {
        f"two rounds, blocks of {block}": [
            point(f"two rounds of {block}, drift {drift}", base, block, 2, drift) for drift in drifts
        ]
        for block in (16, 32)
    }
    keep("No cloak: delta error over drift", "drift", drifts, series, f"width 192 for one round, 256 for two, {origin}")

    ranks = [4, 8, 16, 32]
    series = {}
    for strength in (0.25, 0.5, 1.0, 2.0):
        series[f"strength {strength}"] = [
            point(f"one round of 32, cloak {rank} × {strength}", weight(192), 32, 1, 0.02, rank, strength, (0.03,))
            for rank in ranks
        ]
    keep(
        "One round and a cloak, blocks of 32, 2% drift, singular vectors matched in a band",
        "rank of the cloak",
        [float(rank) for rank in ranks],
        series,
        f"width 192, {origin}",
    )


if __name__ == "__main__":
    main()

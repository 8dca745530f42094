"""Checks of honest answers: the largest residual over tolerance, and how often it is above 1, which must be never.

Products as workers compute them, over dtypes, shapes and operands that are hard on sums, until each of four dtypes has
a quarter of the rows asked for.

    OMP_NUM_THREADS=1 python benchmarks/verify/honest.py [FILE.json [ROWS]]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from exchange import ANSWERS, DTYPES, Exchange, exchange
from torch import Tensor

from tempo.bench.measure import machine
from tempo.wire.messages import Conv, Linear, Product

ROWS = 4_000_000
SHAPES: dict[str, tuple[Product, tuple[int, ...], tuple[int, ...]]] = {
    "8192×64 → 64": (Linear(), (8192, 64), (64, 64)),
    "2048×384 → 96": (Linear(), (2048, 384), (96, 384)),
    "512×768 → 768": (Linear(), (512, 768), (768, 768)),
    "200×3072 → 100": (Linear(), (200, 3072), (100, 3072)),
    "3×3": (Conv((1, 1), (1, 1), (1, 1), 1), (18, 16, 16, 16), (24, 16, 3, 3)),
    "3×3, stride 2, 2 groups": (Conv((2, 2), (1, 1), (1, 1), 2), (8, 32, 16, 16), (32, 16, 3, 3)),
    "1×1": (Conv((1, 1), (0, 0), (1, 1), 1), (8, 64, 16, 16), (32, 64, 1, 1)),
    "depthwise": (Conv((1, 1), (1, 1), (1, 1), 16), (8, 16, 16, 16), (16, 1, 3, 3)),
    "3×3×3": (Conv((1, 1, 1), (1, 1, 1), (1, 1, 1), 1), (2, 4, 8, 8, 8), (8, 4, 3, 3, 3)),
    "5 taps, dilated": (Conv((1,), (4,), (2,), 1), (16, 32, 100), (32, 32, 5)),
}
NUMBERS = ("Gaussian", "positive", "rectified", "equal", "nine decades", "rows apart", "cancelling", "signs")


def numbers(kind: str, z: Tensor, generator: torch.Generator) -> Tensor:
    """Operands of the shape of ``z``, which is Gaussian."""
    if kind == "positive":
        return z.abs() + 3
    if kind == "rectified":
        return z.relu()
    if kind == "equal":
        return torch.full_like(z, float(z.view(-1)[0]))
    if kind == "nine decades":  # within the range of half precision
        return z * 10 ** (9 * torch.rand(z.shape, generator=generator) - 7)
    if kind == "rows apart":
        return z * 10 ** (8 * torch.rand(len(z), generator=generator) - 6).view(-1, *[1] * (z.dim() - 1))
    if kind == "cancelling":  # the first half of a sum against the second
        half = torch.where(torch.arange(z.shape[1]) < z.shape[1] // 2, 1.0, -1.0)
        return z.abs() * half.view(1, -1, *[1] * (z.dim() - 2))
    if kind == "signs":
        return torch.sign(z) * 0.3
    return z


def main(target: Path | None, rows: int) -> None:
    torch.set_num_threads(1)
    found = []
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(0)
        done, largest, alarms, cells = 0, 0.0, 0, {}
        while done < rows / len(DTYPES):
            for shapes in SHAPES.values():
                for kind in NUMBERS:
                    draft = exchange(*shapes, torch.float32, generator)
                    operands = (numbers(kind, t, generator).to(dtype) for t in (draft.x, draft.w, draft.g))
                    sent = Exchange(shapes[0], *operands)
                    checks = sent.checks()
                    for part, answer in sent.answers().items():
                        residual = checks.judge(part, answer)
                        done += residual.rows - residual.unchecked
                        alarms += not residual.passed
                        largest = max(largest, residual.ratio)
                        cells[kind, part] = max(cells.get((kind, part), 0.0), residual.ratio)
        print(f"{str(dtype)[6:]:9} {done} rows, largest ratio {largest:.3f}, {alarms} false alarms")
        for kind in NUMBERS:
            print(f"  {kind:18} " + "  ".join(f"{part} {cells[kind, part]:.3f}" for part in ANSWERS))
        by_kind = {kind: {part: cells[kind, part] for part in ANSWERS} for kind in NUMBERS}
        found.append(
            {"dtype": str(dtype)[6:], "rows": done, "largest": largest, "alarms": alarms, "by_numbers": by_kind}
        )
    if target is not None:
        kept = {"machine": machine(), "shapes": list(SHAPES), "dtypes": found}
        target.write_text(json.dumps(kept, indent=1) + "\n")
    if any(of_dtype["alarms"] for of_dtype in found):
        raise SystemExit("honest answers were rejected")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None, int(sys.argv[2]) if len(sys.argv) > 2 else ROWS)

"""Which lies are found, over the length of the error relative to the tolerance, and what a whole run lets through.

Every trial draws secrets anew. A lie is the honest answer plus a multiple of an error, so that the row in which it is
longest, relative to its tolerance, has the ratio asked for (half precision then rounds it).

    OMP_NUM_THREADS=1 python benchmarks/verify/detection.py [FILE.json]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from exchange import ANSWERS, DTYPES, Checks, Exchange, exchange, rows
from torch import Tensor

from tempo.bench.measure import machine
from tempo.verify.tolerance import FALSE_ALARM, miss, threshold, unseen_ratio
from tempo.wire.messages import Conv, Linear, Product

TRIALS = 200
VECTORS = 4
RATIOS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
KINDS: dict[str, tuple[Product, tuple[int, ...], tuple[int, ...]]] = {
    "linear": (Linear(), (64, 192), (128, 192)),
    "convolution": (Conv((1, 1), (1, 1), (1, 1), 1), (4, 16, 8, 8), (16, 16, 3, 3)),
}


def one_element(honest: Tensor, stale: Tensor, noise: Tensor) -> Tensor:
    error = torch.zeros_like(honest)
    error[(0,) * honest.dim()] = 1
    return error


def one_row(honest: Tensor, stale: Tensor, noise: Tensor) -> Tensor:
    error = torch.zeros_like(honest)
    first = (0,) * (honest.dim() - 1)
    error[first] = honest[first]
    return error


def two_rows(honest: Tensor, stale: Tensor, noise: Tensor) -> Tensor:
    error = torch.zeros_like(honest)
    first = (0,) * (honest.dim() - 2)
    error[(*first, 0)] = honest[(*first, 1)] - honest[(*first, 0)]
    error[(*first, 1)] = -error[(*first, 0)]
    return error


# Errors (all at full size are the attack itself) over rows along all axes but the last.
LIES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "one element changed": one_element,
    "one row scaled": one_row,
    "two rows swapped": two_rows,
    "stale answer": lambda honest, stale, noise: stale - honest,
    "zeros": lambda honest, stale, noise: -honest,
    "spread over all rows": lambda honest, stale, noise: noise,
    "all rows the same way": lambda honest, stale, noise: noise[(0,) * (honest.dim() - 1)].expand_as(honest).clone(),
}


def main(target: Path | None) -> None:
    torch.set_num_threads(1)
    cells = []
    for kind, shapes in KINDS.items():
        for dtype in DTYPES:
            cells += table(kind, shapes, dtype)
    print_cells(cells)
    law = {str(k): {str(ratio): miss(ratio, k) for ratio in RATIOS} for k in (1, 2, 4, 8)}
    print("\nt: the chance that a lie of this ratio is accepted in a whole run of one operator, by number of vectors")
    for k, chances in law.items():
        print(f"{k:>3}  " + "  ".join(f"{ratio}: {chance:.1e}" for ratio, chance in chances.items()))
    quiet = {str(n): unseen_ratio(n, VECTORS) for n in (1, 10**3, 10**6, 10**9)}
    print("\nerrors in every answer, as a ratio, that pass all of so many checks with probability 1/2:", quiet)
    relative = relative_tolerances()
    coarse = coarse_products()
    if target is not None:
        kept = {
            "machine": machine(),
            "vectors": VECTORS,
            "trials": TRIALS,
            "false_alarm": FALSE_ALARM,
            "threshold": threshold(VECTORS),
            "lies": nested(cells),
            "miss": law,
            "unseen_ratio": quiet,
            "relative_tolerances": relative,
            "coarse_products": coarse,
        }
        target.write_text(json.dumps(kept, indent=1) + "\n")


def table(kind: str, shapes: tuple, dtype: torch.dtype) -> list[dict]:
    """Detection rates of all lies in all answers."""
    product = shapes[0]
    generator = torch.Generator().manual_seed(0)
    sent, before = (exchange(*shapes, dtype, generator) for _ in range(2))
    answers, stale = sent.answers(), before.answers()
    lies: list[tuple[str, str, float, float, Tensor]] = []
    for name in ANSWERS:
        honest = answers[name].double()
        honest_rows = rows(product, name, honest)
        tolerance = sent.checks().tolerances(name, answers[name])
        noise = torch.randn(honest_rows.shape, generator=generator, dtype=torch.float64)
        noise *= (tolerance / noise.norm(dim=-1)).unsqueeze(-1)  # all rows equally close to their tolerance
        for lie, error_of in LIES.items():
            error = error_of(honest_rows, rows(product, name, stale[name].double()), noise)
            longest = float((error.norm(dim=-1) / tolerance).max())
            for ratio in RATIOS:
                changed = honest.clone()
                rows(product, name, changed).add_(error * (ratio / longest))
                sent_back = changed.to(dtype)
                off = rows(product, name, sent_back.double() - honest).norm(dim=-1)
                lies.append((name, lie, ratio, float((off / tolerance).max()), sent_back))
        for lie, value in (("NaN", torch.nan), ("infinity", torch.inf)):
            broken = answers[name].clone()
            broken.view(-1)[0] = value
            lies.append((name, lie, torch.inf, torch.inf, broken))
    caught = [0] * len(lies)
    for _ in range(TRIALS):
        checks: Checks = sent.checks(VECTORS)
        for i, (name, *_, answer) in enumerate(lies):
            caught[i] += not checks.judge(name, answer).passed
    return [
        {
            "kind": kind,
            "dtype": str(dtype)[6:],
            "answer": name,
            "lie": lie,
            "ratio": None if ratio == torch.inf else ratio,
            "ratio_rounded": None if ratio == torch.inf else actual,
            "caught": n / TRIALS,
            "law": 1.0 if ratio == torch.inf else 1 - miss(actual, VECTORS),
        }
        for (name, lie, ratio, actual, _), n in zip(lies, caught, strict=True)
    ]


def print_cells(cells: list[dict]) -> None:
    print(
        f"rates of detection over error / tolerance, all answers together ({TRIALS} trials each); law: of one wrong row"
    )
    print(f"{'':44}" + "".join(f"{ratio:>7}" for ratio in RATIOS))
    groups = {(c["kind"], c["dtype"], c["lie"]): None for c in cells}
    for kind, dtype, lie in groups:
        of_group = [c for c in cells if (c["kind"], c["dtype"], c["lie"]) == (kind, dtype, lie)]
        rates = []
        for ratio in RATIOS if of_group[0]["ratio"] is not None else (None,):
            caught = [c["caught"] for c in of_group if c["ratio"] == ratio]
            rates.append(sum(caught) / len(caught))
        print(f"{kind:12} {dtype:9} {lie:22}" + "".join(f"{rate:7.3f}" for rate in rates))
    print(f"{'law':44}" + "".join(f"{1 - miss(ratio, VECTORS):7.3f}" for ratio in RATIOS))


def nested(cells: list[dict]) -> dict:
    """Rates of detection by kind, dtype, answer, lie and ratio as it was after rounding."""
    tree: dict = {}
    for cell in cells:
        branch = tree
        for level in ("kind", "dtype", "answer", "lie"):
            branch = branch.setdefault(cell[level], {})
        branch["any" if cell["ratio"] is None else f"{cell['ratio_rounded']:.3g}"] = cell["caught"]
    return tree


def relative_tolerances() -> dict[str, dict[str, float]]:
    """Tolerance over length of an honest row, Gaussian operands: what a ratio means for the numbers of a run."""
    found: dict[str, dict[str, float]] = {}
    conv = Conv((1, 1), (1, 1), (1, 1), 1)
    cases = {
        "4160×768 → 768": (Linear(), (4160, 768), (768, 768)),
        "4160×768 → 3072": (Linear(), (4160, 768), (3072, 768)),
        "3×3, 32×64×32×32 → 64": (conv, (32, 64, 32, 32), (64, 64, 3, 3)),
    }
    print("\ntolerance / length of the row, median over rows")
    for name, shapes in cases.items():
        sent = exchange(*shapes, torch.float32, torch.Generator().manual_seed(0))
        answers = sent.answers()
        for dtype in (torch.float32, torch.bfloat16):
            checks = exchange(*shapes, dtype, torch.Generator().manual_seed(0)).checks(VECTORS)
            label = f"{name}, {str(dtype)[6:]}"
            found[label] = {}
            for part, answer in answers.items():
                length = rows(shapes[0], part, answer).double().norm(dim=-1)
                found[label][part] = float((checks.tolerances(part, answer.to(dtype)) / length).median())
            print(f"{label:36} " + ", ".join(f"{part} {value:.1e}" for part, value in found[label].items()))
    return found


def coarse_products() -> dict[str, dict[str, float]]:
    """Ratios of a worker that rounds float32 operands to 11 bits, as TF32 does, or to the 8 of bfloat16."""
    found: dict[str, dict[str, float]] = {}
    print("\nratio of float32 products of rounded operands")
    for d, m in ((256, 256), (768, 768), (768, 3072)):
        sent = exchange(Linear(), (1024, d), (m, d), torch.float32, torch.Generator().manual_seed(0))
        for name, dtype in (("TF32", torch.float16), ("bfloat16", torch.bfloat16)):  # float16 has TF32's 11 bits
            rounded = Exchange(Linear(), *(t.to(dtype).float() for t in (sent.x, sent.w, sent.g)))
            checks = sent.checks(VECTORS)
            label = f"{name}, 1024×{d} → {m}"
            found[label] = {part: checks.judge(part, answer).ratio for part, answer in rounded.answers().items()}
            print(f"{label:36} " + ", ".join(f"{part} {ratio:.2f}" for part, ratio in found[label].items()))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)

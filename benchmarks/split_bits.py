"""How much of a product scheme `split` rounds off, by bits of the weight's integers and width. Usage:

OMP_NUM_THREADS=1 python benchmarks/split_bits.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from tempo.schemes.fixed_point import share_rows
from tempo.wire.integers import integers

BITS, WIDTHS, ROWS, OUTPUTS = (8, 10, 11, 12, 13, 14, 16), (384, 768, 2048, 4096, 8192), 64, 512


def error(x: Tensor, w: Tensor, bits: int) -> float:
    """Of ``Y``, relative, next to float64; all that rounds is the weight and the rows."""
    w_q, scales = integers(w, bits)
    rows = torch.empty(x.shape, dtype=torch.int32)
    omega = float(w_q.double().square().sum(1).max().sqrt())
    steps, _ = share_rows(x, None, omega, [], rows, None)
    exact = x.double() @ w.double().t()
    found = (rows.double() * steps) @ (w_q.double() * scales.double()).t()
    return float((found - exact).norm() / exact.norm())


def main() -> None:
    print(f"| features | {' | '.join(f'{bits} bits' for bits in BITS)} | bfloat16 |")
    print("|---" * (len(BITS) + 2) + "|")
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(0)
        x, w = (torch.randn(rows, width, generator=generator) for rows in (ROWS, OUTPUTS))
        exact = x.double() @ w.double().t()
        half = float(((x.bfloat16().double() @ w.bfloat16().double().t()) - exact).norm() / exact.norm())
        cells = [f"{error(x, w, bits):.2%}" for bits in BITS]
        print(f"| {width} | {' | '.join(cells)} | {half:.2%} |")


if __name__ == "__main__":
    main()

"""How much of a product scheme `split` rounds off, by bits of the weight's integers. Usage:

OMP_NUM_THREADS=1 python benchmarks/split_bits.py           # Gaussian rows and weights, by width
OMP_NUM_THREADS=1 python benchmarks/split_bits.py minilm    # those of MiniLM, as `examples/minilm` trains it
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tempo.schemes.fixed_point import share_rows
from tempo.wire.integers import integers

WIDTHS, ROWS, OUTPUTS = (384, 768, 2048, 4096, 8192), 64, 512
BITS = (8, 9, 10, 11, 12, 14, 16)


def rounded(x: Tensor, scales: Tensor | None, w_q: Tensor) -> Tensor:
    """Rows as they are when they are to meet the rows of ``w_q``, float64."""
    rows = torch.empty(x.shape, dtype=torch.int32)
    steps, _ = share_rows(x, scales, float(w_q.double().square().sum(1).max().sqrt()), [], rows, None)
    return rows.double() * steps


def apart(found: Tensor, exact: Tensor) -> float:
    """The relative error."""
    return float((found - exact).norm() / exact.norm())


def gaussian() -> None:
    """The error of ``Y``, by width; operands in bfloat16 for comparison."""
    print(f"| features | {' | '.join(f'{bits} bits' for bits in BITS)} | bfloat16 |")
    print("|---" * (len(BITS) + 2) + "|")
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(0)
        x, w = (torch.randn(rows, width, generator=generator) for rows in (ROWS, OUTPUTS))
        exact = x.double() @ w.double().t()
        found = []
        for bits in BITS:
            w_q, scales = integers(w, bits)
            found.append(apart(rounded(x, None, w_q) @ (w_q * scales.double()).t(), exact))
        found.append(apart(x.bfloat16().double() @ w.bfloat16().double().t(), exact))
        print(f"| {width} | {' | '.join(f'{error:.2%}' for error in found)} |")


def captured(steps: int = 5) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Weight, rows and gradient of every layer with an adapter, at the last of a few steps of training MiniLM."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "minilm"))
    import which_play as example

    speeches, _ = example.speeches(Path(os.environ.get("TEMPO_DATA", ".")) / "text" / "tinyshakespeare.txt")
    model = example.adapted(0)
    rows: dict[nn.Module, Tensor] = {}
    gradients: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        rows[layer] = inputs[0].detach().flatten(0, -2)
        if inputs[0].requires_grad:
            y.register_hook(lambda g: gradients.__setitem__(layer, g.flatten(0, -2)))

    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
            layer.register_forward_hook(keep)
    example.train(model, {name: values[:: 40 // steps] for name, values in speeches.items()}, 0, 1)
    for layer, g in gradients.items():
        yield layer.weight.detach(), rows[layer], g


def minilm() -> None:
    """Errors of ``Y`` and ``dX`` from the weight's rounding, and what that of rows adds: means over layers."""
    layers = list(captured())
    print("| bits | Y: weight | Y: rows | dX: weight | dX: rows |\n|---|---|---|---|---|")
    for bits in range(8, 13):
        errors = []
        for w, x, g in layers:
            w_q, scales = integers(w, bits)
            near, scaled, x, g = w_q * scales.double(), g.double() * scales.double().t(), x.double(), g.double()
            y, dx = x @ near.t(), scaled @ w_q.double()
            y_found = rounded(x.float(), None, w_q) @ near.t()
            dx_found = rounded(g.float(), scales.flatten(), w_q.t()) @ w_q.double()
            errors.append(
                [apart(y, x @ w.double().t()), apart(y_found, y), apart(dx, g @ w.double()), apart(dx_found, dx)]
            )
        found = torch.tensor(errors).mean(0).tolist()
        print(f"| {bits} | {' | '.join(f'{1e6 * error:,.0f}e-6' for error in found)} |")


if __name__ == "__main__":
    minilm() if sys.argv[1:] == ["minilm"] else gaussian()

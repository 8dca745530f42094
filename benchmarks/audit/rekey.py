"""How many rows may one mask of features serve? FastICA against rows served under one ``A``, by block of rows.

Independent features of two kinds, the attacker's best case: hidden layers have common causes. Usage:

    OMP_NUM_THREADS=1 python benchmarks/audit/rekey.py rekey.json
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from tempo.audit import lab
from tempo.audit.attack import Curve
from tempo.audit.report.contents import Report, write
from tempo.audit.solvers.unmixing import fast_ica, features_masked, flat, mean_best_correlation, whiten
from tempo.bench.measure import machine

WIDTH = 64
BATCH = 1024
ROWS = [1 << power for power in (10, 12, 13, 14, 15, 16, 17)]
BLOCKS = (8, 16, 32, 64)
PLAIN_ROWS = 1 << 14


def rectified(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Gaussian, negative half set to zero."""
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).relu()


def exponential(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Of excess kurtosis 6."""
    return -torch.rand(rows, width, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()


FEATURES = {
    "rectified Gaussian (excess kurtosis 2.4)": rectified,
    "exponential (excess kurtosis 6)": exponential,
}


def served(x: Tensor, row_block: int) -> lab.Lab:
    """A session that sent ``x`` to one layer under one ``A``, each batch of rows under an ``L`` of its own."""
    model = nn.Linear(x.shape[1], 32)
    with (
        lab.open_lab(scheme="mix", mix_row_block=row_block, insecure_small_blocks=True, rekey_rows=1 << 20) as opened,
        torch.no_grad(),
    ):
        opened.session.protect(model, base="secret")
        for batch in x.float().split(BATCH):
            model(batch)
    return opened


def separated(opened: lab.Lab, rows: int) -> tuple[float, float]:
    """Mean best correlation of features with what ICA makes of the first rows, and its chance level."""
    calls = opened.views[0].calls
    masked = torch.cat([flat(call.x) for call in calls[: rows // BATCH]])
    all_known = [opened.truth().of(call) for call in calls[: PLAIN_ROWS // BATCH]]
    plain = torch.cat([flat(k["x"]) for k in all_known])
    under = torch.cat([flat(features_masked(k)) for k in all_known])
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))[0]
    return (
        mean_best_correlation(plain, under @ fast_ica(masked, 80)),
        mean_best_correlation(plain, whiten(under)[0] @ rotation),
    )


def main(target: Path) -> None:
    torch.set_num_threads(1)
    curves = []
    for kind, draw in FEATURES.items():
        x = draw(ROWS[-1], WIDTH, torch.Generator().manual_seed(0))
        series: dict[str, list[float | None]] = {}
        for block in BLOCKS:
            opened = served(x, block)
            results = [separated(opened, rows) for rows in ROWS]
            series[f"row blocks of {block}"] = [value for value, _ in results]
            print(kind, block, [f"{value:.2f}" for value, _ in results], flush=True)
        series["chance"] = [chance for _, chance in results]
        curves.append(
            Curve(
                title=f"ICA against rows served under one mask of features: {kind}",
                x_label="rows served under one A",
                y_label="mean best correlation with a plain feature",
                x=[float(rows) for rows in ROWS],
                series=series,
                leaks=0.65,
                note=f"{WIDTH} independent features in blocks of 32, one round; L fresh for every {BATCH} rows.",
            )
        )
    command = "python benchmarks/audit/rekey.py rekey.json"
    write(Report(runs=[], curves=curves, command=command, machine=machine()), target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

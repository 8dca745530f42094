"""How many pictures of a batch come out of a convolution's masked maps? Spatial ICA against the size of the batch.

Raw pictures of 32×32 pixels, all mixed with all: CIFAR-10 in grey where $TEMPO_DATA has it, and pictures made of discs
with the statistics of natural ones. Usage:

    OMP_NUM_THREADS=1 python benchmarks/audit/spatial.py spatial.json
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from tempo.audit.attack import Curve
from tempo.audit.attacks.span import basis, left_over
from tempo.audit.attacks.spatial_ica import recognised, unmix
from tempo.audit.controls.toys import dead_leaves
from tempo.audit.report.contents import Report, write
from tempo.bench.measure import machine
from tempo.errors import DataError
from tempo.recipes import data

BATCHES = [16, 32, 64, 128, 256, 512]


def pictures() -> dict[str, Tensor]:
    found = {"discs (dead leaves)": dead_leaves(BATCHES[-1], 1, 32, torch.Generator().manual_seed(0)).double() - 0.5}
    try:
        images = data.load("cifar10").train.images[: BATCHES[-1]].double()
        found["CIFAR-10, grey"] = images.mean(1, keepdim=True) / 255 - 0.5
    except DataError as error:
        print(f"without CIFAR-10: {error}")
    return found


def main(target: Path) -> None:
    torch.set_num_threads(1)
    recovered: dict[str, list[float | None]] = {}
    residual: dict[str, list[float | None]] = {}
    for name, images in pictures().items():
        recovered[name], residual[f"members, {name}"], residual[f"others, {name}"] = [], [], []
        for batch in BATCHES:
            generator = torch.Generator().manual_seed(batch)
            mixing = torch.linalg.qr(torch.randn(batch, batch, generator=generator, dtype=torch.float64))[0]
            part = images[:batch]
            maps = torch.einsum("ab,bchw->achw", mixing, part).float()
            recovered[name].append(recognised(part, unmix(maps))[0])
            span = basis(maps)
            residual[f"members, {name}"].append(float(left_over(part, span).max()))
            residual[f"others, {name}"].append(float(left_over(part.flip(-1), span).median()))
            print(name, batch, recovered[name][-1], flush=True)
    x = [float(batch) for batch in BATCHES]
    curves = [
        Curve(
            title="Pictures recovered by spatial ICA",
            x_label="batch × channels",
            y_label="share with |correlation| > 0.9",
            x=x,
            series=recovered,
            leaks=0.1,
            note="32×32 pixels, maps mixed densely, float32 on the wire.",
        ),
        Curve(
            title="Known pictures recognised in the span of the maps",
            x_label="batch × channels",
            y_label="part outside the span, relative",
            x=x,
            series=residual,
            note="Members: the largest; others, mirror images of members: the median. From 1024 maps on, all pictures "
            "of 32×32 pixels are in the span.",
        ),
    ]
    command = "python benchmarks/audit/spatial.py spatial.json"
    write(Report(runs=[], curves=curves, command=command, machine=machine()), target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

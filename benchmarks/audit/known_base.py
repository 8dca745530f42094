"""What attacks that know the base recover, over drift: matrices and spatial convolutions, under several schemes.

Random networks, whose rows tell themselves apart the least, Gaussian changes, one recorded step: one masked weight of
each product. Delta error below 1 leaks, and knowing the base alone gives 1. Usage:

    OMP_NUM_THREADS=1 python benchmarks/audit/known_base.py known-base.json
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tempo.audit.attack import Curve, Evidence
from tempo.audit.attacks import REGISTRY
from tempo.audit.attacks.procrustes import correlated
from tempo.audit.attacks.signatures import FULL_DRIFTS
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import InputsMixed
from tempo.audit.report.contents import Report, write
from tempo.bench.measure import machine
from tempo.schemes.mix import Mix

SCHEMES: dict[str, dict[str, Any]] = {
    "tempo": {"scheme": "tempo"},
    "inputs mixed alone, outputs as in tempo": {"masks": InputsMixed(64)},
    "one round of mixing, no cloak": {"masks": Mix(cloak=0, insecure_small_blocks=True)},
    "two rounds of mixing, no cloak": {"masks": Mix(rounds=2, cloak=0, insecure_small_blocks=True)},
    "mix": {"scheme": "mix"},
    "mix-tuned": {"scheme": "mix-tuned"},
}

LEAKS = 0.9
"""Delta error from which downwards the attacks count as successful."""


def matrices(drift: float, **fields: Any) -> Evidence:
    """64 → 128 → 64 features, inputs with common causes."""
    return correlated(drift, width=64, rows=1024, **fields)


def convolutions(drift: float, **fields: Any) -> Evidence:
    """Two of 3×3, 64 channels."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, 64, 3, padding=1))
    return basecase.record(network, drift, inputs=torch.randn(128, 64, 4, 4), **fields)


def main() -> None:
    torch.set_num_threads(1)
    begun, curves = time.perf_counter(), []
    for kind in (matrices, convolutions):
        errors: dict[str, list[float | None]] = {}
        rotations: dict[str, list[float | None]] = {}
        for scheme, fields in SCHEMES.items():
            evidence = kind(0.05, **fields)
            found = []
            for attack in ("signatures", "directions", "singular-vectors"):
                finding = REGISTRY[attack]().run(evidence.view, evidence.knowledge, evidence.truth, "full")
                found += [curve.series["delta error"] for curve in finding.curves]
            errors[scheme] = [
                min((error for error in at if error is not None), default=None) for at in zip(*found, strict=True)
            ]
            rotations[scheme] = [None, *(row_correlation(kind(drift, **fields)) for drift in FULL_DRIFTS[1:])]
            print(kind.__name__, scheme, errors[scheme], rotations[scheme], flush=True)
        about = f"{kind.__doc__} One step recorded; the product that leaks most."
        curves += [
            Curve(
                title=f"Known base, {kind.__name__}: private change over drift",
                x_label="drift of the weight from the public checkpoint",
                y_label="delta error",
                x=list(FULL_DRIFTS),
                series=errors,
                leaks=LEAKS,
                higher_leaks=False,
                note=f"{about} The best of three attacks; knowing the base alone gives 1.",
            ),
            Curve(
                title=f"Known base and data, {kind.__name__}: mask of the input over drift",
                x_label="drift of the weight from the public checkpoint",
                y_label="row correlation of A",
                x=list(FULL_DRIFTS),
                series=rotations,
                leaks=0.5,
                note=f"{about} By procrustes, from moments of the inputs and the weight.",
            ),
        ]
    command = "python benchmarks/audit/known_base.py known-base.json"
    seconds = time.perf_counter() - begun
    write(Report(runs=[], curves=curves, command=command, machine=machine(), seconds=seconds), Path(sys.argv[1]))


def row_correlation(evidence: Evidence) -> float | None:
    """What `procrustes` reaches."""
    finding = REGISTRY["procrustes"]().run(evidence.view, evidence.knowledge, evidence.truth, "full")
    return next((figure.value for figure in finding.figures if figure.name == "row correlation of A"), None)


if __name__ == "__main__":
    main()

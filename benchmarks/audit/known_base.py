"""What attacks that know the base recover, over drift: matrices and spatial convolutions, under several schemes.

Random networks, whose rows tell themselves apart the least, Gaussian changes, one recorded step: one masked weight of
each product. Delta error below 1 leaks, and knowing the base alone gives 1. Usage:

    OMP_NUM_THREADS=1 python benchmarks/audit/known_base.py known_base.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from tempo import schemes
from tempo.audit import basecase
from tempo.audit.attack import Evidence
from tempo.audit.attacks import REGISTRY
from tempo.audit.attacks.procrustes import correlated
from tempo.audit.attacks.signatures import FULL_DRIFTS
from tempo.audit.weak import InputsMixed
from tempo.bench.measure import machine

SCHEMES: dict[str, dict[str, Any]] = {
    "tempo": {"scheme": "tempo"},
    "inputs mixed alone, outputs as in tempo": {"masks": InputsMixed(64)},
    "mix, one round": {"scheme": "mix"},
    "mix, two rounds": {"scheme": "mix", "mix_rounds": 2},
    "mix-tuned": {"scheme": "mix-tuned"},
}


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
    results = []
    for scheme, fields in SCHEMES.items():
        if fields.get("scheme", "mix") not in schemes.names():
            continue
        for kind in (matrices, convolutions):
            evidence = kind(0.05, **fields)
            for attack in ("signatures", "directions", "singular-vectors"):
                finding = REGISTRY[attack]().run(evidence.view, evidence.knowledge, evidence.truth, "full")
                for curve in finding.curves:
                    results.append({"scheme": scheme, "products": kind.__name__, "attack": attack, "curve": curve})
                    print(scheme, kind.__name__, attack, curve.series["delta error"], flush=True)
            found: dict[str, list[float]] = {"row correlation of A": [], "delta error": []}
            for drift in FULL_DRIFTS[1:]:
                evidence = kind(drift, **fields)
                finding = REGISTRY["procrustes"]().run(evidence.view, evidence.knowledge, evidence.truth, "full")
                for figure in finding.figures:
                    if figure.name in found:
                        found[figure.name].append(figure.value)
            results.append({"scheme": scheme, "products": kind.__name__, "attack": "procrustes", "figures": found})
            print(scheme, kind.__name__, "procrustes", found, flush=True)
    about = machine() | {"drifts": FULL_DRIFTS, "command": "python benchmarks/audit/known_base.py known_base.json"}
    Path(sys.argv[1]).write_bytes(
        msgspec.json.format(msgspec.json.encode({"about": about, "results": results})) + b"\n"
    )


if __name__ == "__main__":
    main()

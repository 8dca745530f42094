"""What the allocator and the size of pages cost, in nanoseconds per element, each in a process of its own, in turn.

python benchmarks/pages.py [--rounds N] [--json FILE]

Layers are PyTorch's own, forward and backward, on 4,160 × 3,072 numbers (within an MLP of ViT-B/4, 64 images);
their outputs and gradients are new tensors each time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from tempo.bench.measure import machine
from tempo.engine.memory import keep_heap
from tempo.wire.shared import Segments, SharedPool

ROWS, WIDTH = 4160, 3072
KINDS = {
    "as it comes": "the allocator as it comes",
    "small pages": "kept heap, pages of 4 KiB",
    "large pages": "kept heap, pages of 2 MiB: a session's",
}
_PR_SET_THP_DISABLE = 41


def times(kind: str) -> dict[str, float]:
    """In this process, which is to end afterwards."""
    if kind == "small pages":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    if kind != "as it comes":
        keep_heap()
    torch.set_num_threads(1)
    x, y = torch.randn(ROWS, WIDTH, requires_grad=True), torch.ones(ROWS, WIDTH)
    segments = Segments()
    shared = SharedPool(segments, answers=False).take(x.nbytes).tensor((ROWS, WIDTH), torch.float32)

    def layer(function) -> None:  # type: ignore[no-untyped-def]
        x.grad = None
        function(x).backward(y)

    cases = {
        "copy": lambda: y.copy_(x.detach()),
        "copy to shared memory": lambda: shared.copy_(x.detach()),
        "LayerNorm": lambda: layer(lambda x: F.layer_norm(x, (WIDTH,))),
        "GELU": lambda: layer(F.gelu),
    }
    found = {}
    for name, run in cases.items():
        for _ in range(8):
            run()  # until the heap has grown to what this takes
        taken = []
        for _ in range(7):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        found[name] = median(taken) / x.numel() * 1e9
    segments.close()
    return found


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--kind", choices=list(KINDS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        print(json.dumps(times(arguments.kind)))
        return
    found: dict[str, defaultdict[str, list[float]]] = {kind: defaultdict(list) for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind in KINDS:
            command = [sys.executable, __file__, "--kind", kind]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - this file
            for name, value in json.loads(told).items():
                found[kind][name].append(value)
    table = Table("ns per element", title=f"medians of {arguments.rounds} processes")
    names = list(found["large pages"])
    for name in names:
        table.add_column(name, justify="right")
    for kind, label in KINDS.items():
        table.add_row(label, *(f"{median(found[kind][name]):.2f}" for name in names))
    Console().print(table)
    if arguments.json:
        figures = {kind: {name: median(values) for name, values in found[kind].items()} for kind in KINDS}
        arguments.json.write_text(json.dumps({"machine": machine(), "ns_per_element": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()

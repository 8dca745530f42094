"""Nanoseconds per element of masking a matrix, `tempo` next to `mix`, in turn on one core.

python benchmarks/mask_speed.py [rows [features]]
"""

from __future__ import annotations

import sys
import time

import torch

from tempo.engine.memory import keep_heap
from tempo.keys import KeySchedule
from tempo.schemes.masks import Mask, Masks, draw, draw_blocks

REPEATS = 25
KINDS = {
    "tempo": lambda stream, size: draw(stream, size, 255),
    "mix, one round, 32": lambda stream, size: draw_blocks(stream, size, 32, 1, 1.0),
    "mix, one round, 64": lambda stream, size: draw_blocks(stream, size, 64, 1, 1.0),
    "mix, two rounds, 32": lambda stream, size: draw_blocks(stream, size, 32, 2, 1.0),
}


def main(rows: int = 4160, features: int = 768) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_heap()  # as every session does
    keys = KeySchedule()
    x, out, back = torch.randn(rows, features), torch.empty(rows, features), torch.empty(rows, features)
    times: dict[str, dict[str, list[float]]] = {kind: {"draw": [], "encode": [], "decode": []} for kind in KINDS}
    errors = dict.fromkeys(KINDS, 0.0)
    for _ in range(REPEATS):
        for kind, make in KINDS.items():
            A: Mask = make(keys.fresh(1, "w").stream("A"), features)
            # The thread's own time: what others do on the machine counts only through caches and memory.
            start = time.thread_time()
            masks = Masks(L=make(keys.fresh(1, "x").stream("L"), rows), A=A)
            drawn = time.thread_time()
            masks.encode("x", x, out)
            encoded = time.thread_time()
            # `dx` leaves the workers under the inverse transposes of what `x` went out under: the same work.
            masks.decode("dx", out, back)
            decoded = time.thread_time()
            for name, took in (("draw", drawn - start), ("encode", encoded - drawn), ("decode", decoded - encoded)):
                times[kind][name].append(took)
            if kind != "tempo":  # blocks are orthogonal, so that decoding `dx` also undoes the encoding of `x`
                errors[kind] = max(errors[kind], float((back - x).norm() / x.norm()))
    print(f"{rows}×{features} float32, one thread, ns per element (median and least of {REPEATS})")
    for kind, parts in times.items():
        figures = ", ".join(
            f"{name} {sorted(took)[REPEATS // 2] / x.numel() * 1e9:.2f} ({min(took) / x.numel() * 1e9:.2f})"
            for name, took in parts.items()
        )
        print(f"{kind:20} {figures}, relative error {errors[kind]:.0e}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))

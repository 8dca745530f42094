"""Nanoseconds per element of masking a matrix, `tempo` next to `mix`, in turn on one core."""

from __future__ import annotations

import time
from statistics import median

import torch

from tempo.keys import KeySchedule
from tempo.schemes.masks import Mask, Masks, draw, draw_blocks

ROWS, FEATURES, REPEATS = 4160, 768, 25
KINDS = {
    "tempo": lambda stream, size: draw(stream, size, 255),
    "mix, one round, 32": lambda stream, size: draw_blocks(stream, size, 32, 1, 1.0),
    "mix, two rounds, 32": lambda stream, size: draw_blocks(stream, size, 32, 2, 1.0),
}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keys = KeySchedule()
    x, out = torch.randn(ROWS, FEATURES), torch.empty(ROWS, FEATURES)
    times: dict[str, dict[str, list[float]]] = {kind: {"draw": [], "encode": [], "decode": []} for kind in KINDS}
    for _ in range(REPEATS):
        for kind, make in KINDS.items():
            A: Mask = make(keys.fresh(1, "w").stream("A"), FEATURES)
            start = time.perf_counter()
            masks = Masks(L=make(keys.fresh(1, "x").stream("L"), ROWS), A=A)
            drawn = time.perf_counter()
            masks.encode("x", x, out)
            encoded = time.perf_counter()
            masks.decode("dx", out, torch.empty_like(x))
            decoded = time.perf_counter()
            for name, took in (("draw", drawn - start), ("encode", encoded - drawn), ("decode", decoded - encoded)):
                times[kind][name].append(took)
    print(f"{ROWS}×{FEATURES} float32, one thread, ns per element (median of {REPEATS})")
    for kind, parts in times.items():
        figures = ", ".join(f"{name} {median(took) / x.numel() * 1e9:.2f}" for name, took in parts.items())
        print(f"{kind:20} {figures}")


if __name__ == "__main__":
    main()

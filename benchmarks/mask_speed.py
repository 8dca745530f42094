"""Nanoseconds per element of masking a matrix, `tempo` next to `mix` and `mix-tuned`, in turn on one core.

First the masks alone, then whole schemes: covers, cloaks and all, as a training step applies them.

python benchmarks/mask_speed.py [rows [features]]
"""

from __future__ import annotations

import sys
import time

import torch

from tempo import schemes
from tempo.engine.memory import keep_heap
from tempo.keys import KeySchedule
from tempo.schemes.base import Problem, Target
from tempo.schemes.masks import Mask, Masks, draw, draw_blocks
from tempo.schemes.reply import Passed
from tempo.settings import parse
from tempo.wire.messages import Linear

REPEATS = 25
KINDS = {
    "tempo": lambda stream, size: draw(stream, size, 255),
    "mix, one round, 32": lambda stream, size: draw_blocks(stream, size, 32, 1, 1.0),
    "mix, one round, 64": lambda stream, size: draw_blocks(stream, size, 64, 1, 1.0),
    "mix, two rounds, 32": lambda stream, size: draw_blocks(stream, size, 32, 2, 1.0),
}


SCHEMES = {
    "tempo": ("tempo", {}),
    "mix": ("mix", {}),
    "mix, 8 shield rows": ("mix", {"mix_shield_rows": 8}),
    "mix, two rounds": ("mix", {"mix_rounds": 2}),
    "mix, cloak of 16": ("mix", {"mix_cloak": 16}),
    "mix-tuned": ("mix-tuned", {}),
}


def main(rows: int = 4160, features: int = 768) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_heap()  # as every session does
    masks_alone(rows, features)
    whole_schemes(rows, features)


def whole_schemes(rows: int, features: int) -> None:
    """Everything that the trusted side does to the operands and answers of one square layer in one training step."""
    keys, target = KeySchedule(), [Target(0, "operator", 1.0)]
    x, w, g = torch.randn(rows, features), torch.randn(features, features), torch.randn(rows, features)
    buffers: dict[tuple[int, ...], torch.Tensor] = {}

    def empty(worker: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return buffers.setdefault(shape, torch.empty(shape, dtype=dtype))

    parts = {"w": w.numel(), "x": x.numel(), "y": x.numel(), "g": x.numel(), "dx": x.numel(), "dw": w.numel()}
    times: dict[str, dict[str, list[float]]] = {name: {part: [] for part in parts} for name in SCHEMES}
    made = {label: schemes.create(name, parse(fields)) for label, (name, fields) in SCHEMES.items()}
    for _ in range(REPEATS):
        for label, scheme in made.items():
            reply = torch.randn(scheme.rows_sent(rows), features)
            marks = [time.thread_time()]

            def done(mark: list[float] = marks) -> None:
                mark.append(time.thread_time())

            weight = scheme.encode_weight(Problem(Linear(), x.dtype), w, keys.fresh(1, "w"), target, empty)
            done()
            source = weight.encode_input(x, keys.fresh(1, "x"), target, empty, lambda: w)
            done()
            source.decode_output({0: Passed(reply)}, [features])
            done()
            gradient = source.encode_gradient(g, keys.fresh(1, "g"), empty, lambda: x, lambda: w, want_dw=True)
            done()
            gradient.decode_input_gradient({0: Passed(reply)})
            done()
            gradient.decode_weight_gradient({0: Passed(w)}, [features])
            done()
            for part, start, end in zip(parts, marks, marks[1:], strict=False):
                times[label][part].append(end - start)
    print(f"\nwhole schemes, {rows}×{features} through {features}×{features}, ns per element (median of {REPEATS})")
    for label, taken in times.items():
        medians = {part: sorted(took)[REPEATS // 2] for part, took in taken.items()}
        figures = ", ".join(f"{part} {medians[part] / parts[part] * 1e9:.1f}" for part in parts)
        mean = sum(medians[part] for part in ("x", "y", "g", "dx")) / (4 * x.numel()) * 1e9
        print(f"{label:20} {figures}; activations {mean:.1f}")


def masks_alone(rows: int, features: int) -> None:
    """Drawing ``L``, encoding ``X`` and decoding ``dX``."""
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
            masks.decode("dx", out, [back])
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

"""What checking costs next to copying the same tensors and to masking them, in turn on one core.

Nanoseconds per element of what is checked, and checks relative to masking, over one training step of one layer. Answers
that are matrices are summed while they are unmasked where there are kernels for it: that is ``mix, watched``, to be
compared with ``mix``, and then counts for the check instead of a reading of their own.
Times are the thread's own: what others do on the machine counts only through caches and memory.

    OMP_NUM_THREADS=1 python benchmarks/verify/cost.py [FILE.json]
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from tempo import schemes
from tempo.bench.measure import machine
from tempo.engine.geometry import output_shape
from tempo.engine.memory import keep_heap
from tempo.errors import WorkerLiedError
from tempo.keys import KeySchedule
from tempo.schemes.base import Problem, Target
from tempo.schemes.reply import Passed, Reply, Unmask, Watch
from tempo.settings import Settings
from tempo.verify.checks import WeightCheck
from tempo.wire.messages import Conv, Linear, Product
from tempo.worker.compute import TorchCompute

REPEATS = 15
VECTORS = (1, 4)
PARTS = ("w", "x", "y", "g", "dx", "dw")
CASES: dict[str, tuple[Product, tuple[int, ...], tuple[int, ...], torch.dtype]] = {
    "4160×768 → 768": (Linear(), (4160, 768), (768, 768), torch.float32),
    "4160×768 → 3072": (Linear(), (4160, 768), (3072, 768), torch.float32),
    "4160×768 → 3072, bfloat16": (Linear(), (4160, 768), (3072, 768), torch.bfloat16),
    "3×3, 64×64×32×32 → 64": (Conv((1, 1), (1, 1), (1, 1), 1), (64, 64, 32, 32), (64, 64, 3, 3), torch.float32),
}


class Clock:
    """Times parts of a round, one after the other."""

    def __init__(self) -> None:
        self.times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def start(self, label: str) -> None:
        self.label, self.mark = label, time.thread_time()

    def done(self, part: str) -> None:
        now = time.thread_time()
        self.times[self.label][part].append(now - self.mark)
        self.mark = time.thread_time()

    def medians(self, label: str) -> dict[str, float]:
        return {part: sorted(took)[len(took) // 2] for part, took in self.times[label].items()}


def check(clock: Clock, product: Product, tensors: dict[str, Tensor], vectors: int, keys: KeySchedule) -> None:
    clock.start(f"check, {vectors}")
    weight = WeightCheck(product, tensors["w"], keys.fresh(0, "w"), vectors)
    clock.done("w")
    source = weight.forward(tensors["x"], keys.fresh(0, "x"), keep=True)
    clock.done("x")
    found = [source.output(tensors["y"])]
    clock.done("y")
    gradient = source.backward(tensors["g"], want_dx=True, want_dw=True)
    clock.done("g")
    found.append(gradient.input_gradient(tensors["dx"]))
    clock.done("dx")
    found.append(gradient.weight_gradient(tensors["dw"]))
    clock.done("dw")
    if not all(residual.passed for residual in found):
        raise SystemExit(f"an honest answer was rejected: {found}")


def copy(clock: Clock, tensors: dict[str, Tensor]) -> None:
    into = {part: torch.empty_like(tensor) for part, tensor in tensors.items()}
    for part in PARTS:
        clock.start("copy")
        into[part].copy_(tensors[part])
        clock.done(part)


class Watched(Reply):
    """An answer whose rows are summed with four vectors while it is unmasked."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self._tensor, self._vectors = tensor.shape, tensor, torch.randn(4, tensor.shape[1])

    def checked(self) -> Tensor:
        return self._tensor

    def wrong(self, row: int) -> WorkerLiedError:
        return Passed(self._tensor).wrong(row)

    def read(self, unmask: Unmask) -> None:
        unmask(self._tensor, watch=Watch.of(self._vectors, len(self._tensor)) if self._tensor.dim() == 2 else None)


def mask(
    clock: Clock, product: Product, tensors: dict[str, Tensor], keys: KeySchedule, reply: type[Passed] | type[Watched]
) -> None:
    """Masking and unmasking as a training step under `mix` does it, with its defaults."""
    label = "mix" if reply is Passed else "mix, watched"
    x, w, g = (tensors[part] for part in "xwg")
    scheme, target = schemes.create("mix", Settings()), [Target(0, "operator", 1.0)]
    buffers: dict[tuple[int, ...], Tensor] = {}

    def empty(worker: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return buffers.setdefault(shape, torch.empty(shape, dtype=dtype))

    weight = scheme.encode_weight(Problem(product, x.dtype), w, keys.fresh(1, "w"), target, empty)  # warms buffers
    clock.start(label)
    weight = scheme.encode_weight(Problem(product, x.dtype), w, keys.fresh(1, "w"), target, empty)
    clock.done("w")
    source = weight.encode_input(x, keys.fresh(1, "x"), target, empty, lambda: w)
    clock.done("x")
    sent_x, sent_w = (source.operands[0].tensors["x"].shape, weight.operands[0].tensors["w"].shape)
    y, dx, dw = (torch.randn(s).to(x.dtype) for s in (output_shape(product, sent_x, sent_w), sent_x, sent_w))
    clock.start(label)
    source.decode_output({0: reply(y)}, [len(w)])
    clock.done("y")
    gradient = source.encode_gradient(g, keys.fresh(1, "g"), empty, lambda: x, lambda: w, want_dw=True)
    clock.done("g")
    gradient.decode_input_gradient({0: reply(dx)})
    clock.done("dx")
    gradient.decode_weight_gradient({0: reply(dw)}, [len(w)])
    clock.done("dw")


def answers(product: Product, x: Tensor, w: Tensor) -> dict[str, Tensor]:
    compute = TorchCompute(torch.device("cpu"))
    g = torch.randn(output_shape(product, tuple(x.shape), tuple(w.shape))).to(x.dtype)
    y, dx, dw = (torch.empty_like(t) for t in (g, x, w))
    compute.forward(product, x, w, y)
    compute.input_gradient(product, g, w, dx)
    compute.weight_gradient(product, g, x, dw)
    return {"w": w, "x": x, "y": y, "g": g, "dx": dx, "dw": dw}


def main(target: Path | None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_heap()  # as every session does
    keys, kept = KeySchedule(), {}
    for name, (product, x, w, dtype) in CASES.items():
        tensors = answers(product, torch.randn(x).to(dtype), torch.randn(w).to(dtype))
        clock = Clock()
        for _ in range(REPEATS):
            copy(clock, tensors)
            for vectors in VECTORS:
                check(clock, product, tensors, vectors, keys)
            for reply in (Passed, Watched):
                mask(clock, product, tensors, keys, reply)
        print(f"\n{name}, {str(dtype)[6:]}: ns per element (median of {REPEATS})")
        total = sum(clock.medians("mix").values())
        kept[name] = {}
        for label in clock.times:
            medians = clock.medians(label)
            per_element = {part: medians[part] / tensors[part].numel() * 1e9 for part in PARTS}
            whole = sum(medians.values())
            share = whole / total
            figures = ", ".join(f"{part} {ns:.2f}" for part, ns in per_element.items())
            print(f"{label:12} {figures}; {whole * 1e3:.1f} ms in all, {share:.1%} of mix")
            kept[name][label] = {"ns_per_element": per_element, "seconds": whole, "of_mix": share}
    if target is not None:
        target.write_text(json.dumps({"machine": machine(), "repeats": REPEATS, "cases": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)

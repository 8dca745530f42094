"""What a product mod p takes on a worker's device, next to a float32 product of the same shape, in turn on one core.

python benchmarks/modular.py [--device cpu] [--rows N] [--repeats N]

Both ways of `tempo.worker.modular`, with weights of 8 and 12 bits, forward and backward. Times of a CPU are those of
the processor, not the clock; the least of several counts.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tempo.wire.residues import HALF
from tempo.worker.device import Device, open_device
from tempo.worker.modular import Doubles, Limbs

SHAPES = [(768, 3072), (2048, 8192)]


def least(device: Device, repeats: int, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each, in turn."""
    clock = time.perf_counter if device.queues else time.thread_time
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            run()
            device.mark()()
            found[name].append(clock() - start)
    return {name: min(seconds) for name, seconds in found.items()}


def compare(device: Device, repeats: int, rows: int, b: Tensor, bits: int) -> str:
    """What one product takes, and how many times as long both ways do."""
    largest = (1 << (bits - 1)) - 1
    a = torch.randint(-HALF, HALF + 1, (rows, len(b)), device=device.torch).to(torch.int32)
    out = torch.empty(rows, b.shape[1], dtype=torch.int32, device=device.torch)
    x, v, y = a.float(), b.float(), out.float()
    taken = least(
        device,
        repeats,
        {
            "float32": lambda: torch.mm(x, v, out=y),
            "doubles": lambda: Doubles(b, largest).multiply(a, out),
            "limbs": lambda: Limbs(b, largest).multiply(a, out),
        },
    )
    once = taken.pop("float32")
    ratios = ", ".join(f"{name} x {seconds / once:.2f}" for name, seconds in taken.items())
    return f"float32 {once * 1e3:8.1f} ms, {ratios}"


def main() -> None:
    """Print a line for each shape, weight and way through it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = open_device(torch.device(args.device))
    print(f"{platform.machine()} {device.torch}, PyTorch {torch.__version__}, {args.rows} rows")
    with torch.inference_mode(), device.working():
        for d, m in SHAPES:
            for bits, dtype in (8, torch.int8), (12, torch.int16):
                largest = (1 << (bits - 1)) - 1
                w = torch.randint(-largest, largest + 1, (m, d), device=device.torch).to(dtype)
                for name, b in ("forward", w.t()), ("backward", w):
                    print(f"{d} to {m}, {bits:2} bits, {name:8}:", compare(device, args.repeats, args.rows, b, bits))


if __name__ == "__main__":
    main()

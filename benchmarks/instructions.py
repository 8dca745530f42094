"""Instructions per element of the native kernels, counted by valgrind: the same on every run, unlike times.

    python benchmarks/instructions.py            # compare with instructions.json; exit status 1 if any is above
    python benchmarks/instructions.py --write    # write instructions.json anew

Each kernel is called once and then twice; the difference is one call, without what surrounds it. AVX-512 is
beyond valgrind, so ``avx2`` is what is counted: both are compiled from one source.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ISA = "avx2"
TOLERANCE = 0.1
"""How far above what `FILE` has a count may be: compilers differ."""

FILE = Path(__file__).with_suffix(".json")
ROWS, COLUMNS = 192, 256

Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments. NumPy's arrays stand for tensors: PyTorch takes minutes to load under valgrind."""


def kernels() -> dict[str, tuple[Call, int]]:
    """By name, a call of each kernel and how many elements it is for. To count another one, add a line."""
    from tempo import _kernels as native

    if ISA not in native.supported():
        sys.exit(f"this installation has no {ISA} kernels, only {native.supported()}")
    native.select(ISA)
    x, y = floats(ROWS, COLUMNS), floats(ROWS, COLUMNS)
    half = Half(x)
    size = x.size
    v, q = floats(4, COLUMNS), floats(4, ROWS)
    of_rows, of_columns = (floats(4, ROWS), np.zeros(ROWS)), (floats(4, COLUMNS), np.zeros(COLUMNS))
    of_both = np.zeros((2, COLUMNS))
    integers, residues, sums = (
        np.zeros(x.shape, np.int32),
        np.ones((2, COLUMNS), np.int32),
        np.zeros((ROWS, 2), np.int64),
    )
    maps, met = floats(2, 64, 64), np.random.default_rng(0).integers(-1, 64, (64, 9), np.int32)
    patches = floats(2, 64, 9 * 64)
    heads = [floats(2, 4, 65, 64) for _ in range(8)]
    few = [floats(2, 2, 65, 64) for _ in range(2)]
    lse, angles, z = floats(2, 4, 65), (floats(1, 65, 64), floats(1, 65, 64)), floats(ROWS, COLUMNS)
    triangles, squares = np.random.default_rng(0).standard_normal((16, 32 * 33 // 2)), np.zeros((16, 32, 32))
    uniform = np.random.default_rng(0).integers(1 << 63, size=1 << 13).view(np.float64)
    single_uniform = uniform.view(np.float32).copy()
    single_triangles, single_squares = triangles.astype(np.float32), squares.astype(np.float32)
    return {
        "permute": (sandwich(x, y, permuted(ROWS), permuted(COLUMNS)), size),
        "permute, to bfloat16": (sandwich(x, half, permuted(ROWS), permuted(COLUMNS)), size),
        "permute, from bfloat16": (sandwich(half, y, permuted(ROWS), permuted(COLUMNS)), size),
        "blocks of 16 on both sides": (sandwich(x, y, blocks(ROWS, 16), blocks(COLUMNS, 16)), size),
        "blocks of 32 on both sides": (sandwich(x, y, blocks(ROWS, 32), blocks(COLUMNS, 32)), size),
        "two rounds of 32 on both sides": (sandwich(x, y, blocks(ROWS, 32, 2), blocks(COLUMNS, 32, 2)), size),
        "blocks of 32, checked": (sandwich(x, y, blocks(ROWS, 32), blocks(COLUMNS, 32), (v, *of_rows)), size),
        "blocks of 32, summed as sent": (
            sandwich(x, y, blocks(ROWS, 32), blocks(COLUMNS, 32), None, None, (v, *of_rows, (q, *of_columns))),
            size,
        ),
        "permute, plus rank 16": (
            sandwich(x, y, permuted(ROWS), permuted(COLUMNS), None, (floats(ROWS, 16), floats(16, COLUMNS))),
            size,
        ),
        "sums of rows, copying": ((native.sums, (x, y, v, *of_rows)), size),
        "sums of rows and columns": ((native.sums, (x, None, v, *of_rows, q, *of_columns)), size),
        "sums of rows and columns, bfloat16": ((native.sums, (half, None, v, *of_rows, q, *of_columns)), size),
        "sums over taps": (over_taps(back=False), ROWS * 64),
        "sums over taps, back": (over_taps(back=True), ROWS * 64),
        "comparison of sums": ((native.compare, comparison()), ROWS * COLUMNS),
        "expand a seed": ((native.expand, (SEED, 0, integers.reshape(-1), (1 << 31) - 3)), size),
        "share": (share(x, 1), size),
        "share, bfloat16": (share(half, 1), size),
        "share among three, checked": (share(x, 2, residues, sums), size),
        "combine": (combine(y, 2), size),
        "combine three, checked": (combine(y, 3, residues, sums), size),
        "combine, adding a product of rank 16": (combine(y, 2, rank=16), size),
        "rows with 16 vectors": ((native.tall_products, (x, floats(16, COLUMNS), floats(ROWS, 16), None, None)), size),
        "columns with 16 vectors": (
            (native.tall_products, (x, None, None, floats(ROWS, 16), floats(16, COLUMNS))),
            size,
        ),
        "six Lanczos steps": ((native.lanczos, (x, z[:, 0] / np.linalg.norm(z[:, 0]), np.zeros((6, 6)))), size),
        "patches of 3×3": ((native.make_patches, (maps, met, patches)), patches.size),
        "patches of 3×3, gradient": ((native.add_patches, (patches, met, maps)), patches.size),
        "rows that are dead": ((native.dead_rows, (x[:, None], np.zeros(ROWS, bool))), size),
        "columns that are dead": ((native.dead_columns, (x[:, None], np.zeros(COLUMNS, bool))), size),
        "sums of integers": ((native.sum_rows, (integers, residues, sums)), size),
        "GELU": ((native.activation, ("gelu", x, None, y)), size),
        "GELU, gradient": ((native.activation, ("gelu", x, x, y)), size),
        "SiLU, gradient": ((native.activation, ("silu", x, x, y)), size),
        "SwiGLU": ((native.gated, ("silu", x, x, None, y, None)), size),
        "SwiGLU, gradient": ((native.gated, ("silu", x, x, x, y, z)), size),
        "RMSNorm": ((native.rms_norm, (x, v[0].copy(), None, y, q[0].copy(), 1e-6)), size),
        "RMSNorm, gradient": ((native.rms_norm, (x, v[0].copy(), x, y, q[0].copy(), 1e-6)), size),
        "BatchNorm, moments": ((native.sum_channels, (x, None, None, v[0].copy(), None, None, None, of_both)), size),
        "BatchNorm, residual and ReLU": ((native.normalize, (x, x, v[0].copy(), v[1].copy(), True, y)), size),
        "BatchNorm and ReLU, sums of gradients": (
            (native.sum_channels, (x, x, None, v[0].copy(), v[1].copy(), v[2].copy(), None, of_both)),
            size,
        ),
        "BatchNorm and ReLU, gradient": (
            (native.normalize_gradient, (x, x, *(v[i % 4].copy() for i in range(5)), y)),
            size,
        ),
        "rotary embedding": ((native.rotate, (heads[0], *angles, heads[1], False)), lse.size * 64),
        "attention": ((native.attention, (*heads[:4], lse, 0.125, False)), lse.size * 64),
        "attention, gradient": (
            (native.attention_gradient, (*heads[:5], lse, *heads[5:], 0.125, False)),
            lse.size * 64,
        ),
        "causal attention of groups": (
            (native.attention, (heads[0], *few, heads[3], lse, 0.125, True)),
            lse.size * 64,
        ),
        "causal attention of groups, gradient": (
            (native.attention_gradient, (*heads[:2], *few, heads[4], lse, heads[5], *few, 0.125, True)),
            lse.size * 64,
        ),
        "Gaussian numbers": ((native.gaussians, (uniform,)), uniform.size),
        "Gaussian numbers, single": ((native.gaussians, (single_uniform,)), single_uniform.size),
        "orthogonal blocks of 32": ((native.orthogonal, (triangles, squares)), squares.size),
        "orthogonal blocks of 32, single": ((native.orthogonal, (single_triangles, single_squares)), squares.size),
    }


def floats(*shape: int) -> np.ndarray:
    """Numbers; what they are does not matter to a kernel without branches."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def permuted(size: int) -> Any:
    """A mask that permutes and scales."""
    return mask(size, [], floats(size).astype(np.float64))


def blocks(size: int, side: int, rounds: int = 1) -> Any:
    """A mask that permutes and multiplies blocks, so many times."""
    return mask(size, [[floats(size // side, side, side)] for _ in range(rounds)])


def mask(size: int, blocks: Any, scale: Any = None) -> Any:
    """A mask in its plain form."""
    from tempo import _kernels as native

    gathers = [np.random.default_rng(i).permutation(size).astype(np.int32) for i in range(len(blocks) + 1)]
    return native.Mask(gathers, scale, blocks, blocks), 0


def sandwich(x: Any, y: Any, rows: Any, columns: Any, watch: Any = None, plus: Any = None, tally: Any = None) -> Call:
    """A mask from ``x`` to ``y``; ``watch`` is what `Watch` has, ``tally`` what `Tally`, ``plus`` two factors."""
    from tempo import _kernels as native

    return native.sandwich, (x, rows, columns, [y], 0, [None], watch, plus, tally)


def over_taps(*, back: bool) -> Call:
    """Sums of three images of 8 x 8 pixels with the vectors of 3 x 3 taps."""
    from tempo import _kernels as native

    x, kernel, sums, lengths = (
        floats(3, 8, 8, 64),
        floats(4 if back else 8, 64, 3, 3),
        floats(8, 3, 8, 8),
        np.ones(ROWS),
    )
    return native.taps, (x, kernel, sums[: len(kernel)], lengths, np.zeros(ROWS), (1, 1), (1, 1), (1, 1), back)


def comparison() -> tuple[Any, ...]:
    """Sums of as many rows as there are elements, with four vectors each."""
    sums, lengths = floats(1, 4, ROWS * COLUMNS), np.ones((1, ROWS * COLUMNS))
    return sums, sums + 1, lengths, np.ones(1), lengths, (1e-6, 1e-3, 1e-6, 1e-37), 0.0, 7.9, 1e38


SEED = bytes(32)


def share(x: Any, seeds: int, vectors: Any = None, sums: Any = None) -> Call:
    """What scheme `split` sends of ``x``, among one worker more than ``seeds``."""
    from tempo import _kernels as native

    out, steps = np.zeros((ROWS, COLUMNS), np.int32), floats(ROWS, 1)
    return native.share, (x, None, 1e-4, 2.0**-126, [SEED] * seeds, 0, out, steps, vectors, sums)


def combine(y: Any, parts: int, vectors: Any = None, sums: Any = None, rank: int = 0) -> Call:
    """And what it makes of the answers."""
    from tempo import _kernels as native

    answers = [np.zeros((ROWS, COLUMNS), np.int32)] * parts
    added = [(floats(ROWS, rank), floats(rank, COLUMNS)) if rank else None]
    return native.combine, (answers, floats(ROWS, 1), y[0].copy(), [y[0].copy()], [y], vectors, sums, added)


class Half:
    """An array of bfloat16, which NumPy has none of: it says so to whom it lends its memory."""

    def __init__(self, like: np.ndarray) -> None:
        self._bits = np.zeros(like.shape, np.uint16)

    def __getitem__(self, index: Any) -> Half:
        part = Half(self._bits[:0])
        part._bits = self._bits[index]
        return part

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._bits.__dlpack_device__()

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self._bits.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        at = pointer(capsule, b"dltensor")
        # Data, device (two 32-bit integers) and the number of axes come before the type, whose first byte is its code.
        ctypes.c_uint8.from_address(at + ctypes.sizeof(ctypes.c_void_p) + 12).value = 4
        return capsule


_HELPER = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void begin(void) { CALLGRIND_ZERO_STATS; }
void end(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
"""


def count() -> dict[str, float]:
    """Instructions per element of each of `kernels`.

    Raises:
        LookupError: valgrind or a C compiler is missing, and which.
        RuntimeError: A kernel failed.
    """
    compiler = os.environ.get("CC", "cc")
    for tool in "valgrind", compiler:
        if shutil.which(tool) is None:
            raise LookupError(f"{tool} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        helper, dump = Path(folder, "helper.so"), Path(folder, "dump")
        source = Path(folder, "helper.c")
        source.write_text(_HELPER)
        build = [compiler, "-shared", "-fPIC", "-O1", "-o", str(helper), str(source)]
        built = subprocess.run(build, capture_output=True, text=True, check=False)  # noqa: S603
        if built.returncode:
            raise LookupError(f"valgrind's headers, or a working {compiler}, are not installed: {built.stderr}")
        options = ["--tool=callgrind", "--dump-line=no", "--instr-atstart=no", f"--callgrind-out-file={dump}"]
        one_thread = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = ["valgrind", "-q", *options, sys.executable, __file__, "--within", str(helper)]
        environment = os.environ | one_thread
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        if run.returncode:
            raise RuntimeError(f"a kernel failed under valgrind: {run.stderr or run.stdout}")
        sizes = json.loads(run.stdout)
        totals = {}
        for part in Path(folder).glob("dump.*"):
            lines = dict(line.split(": ", 1) for line in part.read_text().splitlines() if ": " in line)
            totals[lines["desc"].removeprefix("Trigger: Client Request: ")] = int(lines["totals"])
    return {name: round((totals[f"2 {name}"] - totals[f"1 {name}"]) / size, 3) for name, size in sizes.items()}


def within(helper: str) -> None:
    """Call each kernel, under valgrind."""
    tell = ctypes.CDLL(helper)
    calls = kernels()
    for (function, arguments), _ in calls.values():
        function(*arguments)  # takes the memory that it keeps
    tell.start()
    for name, ((function, arguments), _) in calls.items():
        for times in 1, 2:
            tell.begin()
            for _ in range(times):
                function(*arguments)
            tell.end(f"{times} {name}".encode())
    print(json.dumps({name: size for name, (_, size) in calls.items()}))


def expected() -> dict[str, float]:
    """The counts in `FILE`."""
    found: dict[str, float] = json.loads(FILE.read_text())[ISA]
    return found


def above(counted: dict[str, float], expected: dict[str, float]) -> list[str]:
    """What is wrong with ``counted``, in words."""
    wrong = [f"{name}: not in {FILE.name}; write it anew" for name in counted.keys() - expected.keys()]
    wrong += [f"{name}: in {FILE.name}, but not counted any more" for name in expected.keys() - counted.keys()]
    for name in counted.keys() & expected.keys():
        if counted[name] > expected[name] * (1 + TOLERANCE):
            wrong.append(f"{name}: {counted[name]:.2f} instructions an element, {expected[name]:.2f} expected")
    return sorted(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name} anew")
    parser.add_argument("--within", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.within:
        within(options.within)
        return
    counted = count()
    if options.write:
        FILE.write_text(json.dumps({ISA: counted}, indent=2) + "\n")
    print(f"{'instructions an element':40} {'counted':>8} {'expected':>8}")
    for name, figure in counted.items():
        print(f"{name:40} {figure:8.2f} {expected().get(name, float('nan')):8.2f}")
    if wrong := above(counted, expected()):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()

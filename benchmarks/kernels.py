"""Nanoseconds per element of native kernels, next to PyTorch's and to a copy of as many elements, in turn on one core.

python benchmarks/kernels.py [--json FILE] [--repeats N] [NAME...]

Times are of the processor, not the clock, and the least of several: other work on the machine then shows least. A new
kernel is a function that makes its operands and a line in `KERNELS`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from tempo import kernels
from tempo.bench.measure import machine
from tempo.engine.memory import keep_heap
from tempo.keys import KeySchedule, Keystream
from tempo.schemes import haar
from tempo.schemes.fixed_point import combine_rows, share_rows
from tempo.schemes.masks import Form, Mask, draw, draw_blocks
from tempo.schemes.reply import Watch
from tempo.schemes.sandwich import sandwich
from tempo.trusted.batch_norm import norm_relu
from tempo.trusted.gated import gated
from tempo.trusted.mode import TrustedMode
from tempo.trusted.modules import replace_modules
from tempo.trusted.rotary import rotate_pair
from tempo.verify.field import VECTORS
from tempo.verify.sums import of_both, of_rows
from tempo.wire.residues import SEED_BYTES, expand

ROWS, WIDTH = 4160, 3072  # what is between the two large layers of ViT-B/4, 64 images


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on operands that are there already."""

    elements: int
    """That figures are per."""
    native: Callable[[], object]
    torch: Callable[[], object]
    """The same without native kernels."""


def both(elements: int, run: Callable[[], object]) -> Case:
    """What chooses its kernels by itself."""

    def without() -> None:
        with kernels.using(kernels.TORCH):
            run()

    return Case(elements, run, without)


def within(function: Callable[..., torch.Tensor], *operands: torch.Tensor) -> Callable[[], torch.Tensor]:
    """``function`` as a protected model runs it."""

    def run() -> torch.Tensor:
        with TrustedMode():
            return function(*operands)

    return run


def forward(function: Callable[..., torch.Tensor], *operands: torch.Tensor) -> Case:
    """The value alone."""
    return both(operands[0].numel(), within(function, *operands))


def backward(function: Callable[..., torch.Tensor], *operands: torch.Tensor) -> Case:
    """The gradients alone."""
    leaves = [t.requires_grad_() for t in operands]
    outputs = [within(function, *leaves)()]
    with kernels.using(kernels.TORCH):
        outputs.append(within(function, *leaves)())
    g = torch.randn_like(outputs[0])

    def gradients(y: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(y, leaves, g, retain_graph=True)

    return Case(operands[0].numel(), *map(gradients, outputs))


def hidden() -> torch.Tensor:
    """What an activation is applied to."""
    return torch.randn(ROWS, WIDTH)


def heads(samples: int, count: int, tokens: int, width: int) -> list[torch.Tensor]:
    """Queries, keys and values as projections leave them."""
    return [torch.randn(samples, tokens, count, width).transpose(1, 2) for _ in range(3)]


def grouped(samples: int, count: int, kv_count: int, tokens: int, width: int) -> list[torch.Tensor]:
    """The same where queries share heads of keys and values."""
    return [heads(samples, count, tokens, width)[0], *heads(samples, kv_count, tokens, width)[1:]]


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as in Llama."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def norm() -> torch.nn.Module:
    """RMSNorm of Llama with frozen weights, as a protected model computes it."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(WIDTH).requires_grad_(False)
    replace_modules(module)
    return module


def maps(count: int) -> list[torch.Tensor]:
    """Of a ResNet's first stage, channels last: 32 images of 128 × 128, and what is added to them."""
    return [torch.randn(32, 32, 32, 256).movedim(-1, 1) for _ in range(count)]


def batch_norm(x: torch.Tensor) -> torch.Tensor:
    """By statistics of the batch, which averages follow."""
    channels = torch.zeros(4, x.shape[1])
    return F.batch_norm(x, *channels, training=True)


def batch_norm_relu(x: torch.Tensor, *residual: torch.Tensor) -> torch.Tensor:
    """With what follows it in a residual network."""
    return norm_relu(torch.nn.BatchNorm2d(x.shape[1]), x, *residual)


def rotation() -> Callable[[torch.Tensor], torch.Tensor]:
    """Of queries of 256 tokens with heads of 64 features."""
    cos, sin = torch.randn(2, 1, 256, 64)
    return lambda q: rotate_pair(q, q[:, :1], cos, sin)[0]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As in Llama."""
    return gated("silu", gate, up)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU as in GPT-2."""
    return F.gelu(x, approximate="tanh")


def saved() -> Case:
    """The product that goes out instead, per element of its input: how dear a machine's copies are beside it."""
    x, w, y = torch.randn(ROWS, WIDTH // 4), torch.randn(WIDTH, WIDTH // 4), torch.empty(ROWS, WIDTH)
    return both(x.numel(), lambda: torch.mm(x, w.T, out=y))


def mask(make: Callable[[Keystream, int], Mask], dtype: torch.dtype = torch.float32, *, checked: bool = False) -> Case:
    """A mask on rows and one on columns; ``checked``: with sums of the rows that are read, made on the way."""
    key = KeySchedule().fresh(1, "benchmark")
    rows, columns = (make(key.stream(name), size).operator(Form.PLAIN) for name, size in (("L", ROWS), ("A", WIDTH)))
    x, out, v = torch.randn(ROWS, WIDTH), torch.empty(ROWS, WIDTH, dtype=dtype), torch.randn(4, WIDTH)

    def run() -> None:
        watch = Watch.of(v, ROWS) if checked else None
        sandwich(x, rows, columns, [out], watch=watch)
        if watch is not None and not watch.seen:
            of_rows(x, v)

    return both(x.numel(), run)


def sums(*, columns: bool) -> Case:
    """Four sums of every row, and of every column too."""
    x, v, q = torch.randn(ROWS, WIDTH), torch.randn(4, WIDTH), torch.randn(4, ROWS)
    return both(x.numel(), lambda: of_both(x, v, q) if columns else of_rows(x, v))


def share(dtype: torch.dtype = torch.float32, *, shares: int = 1, checked: bool = False) -> Case:
    """Rows as they go out under scheme `split`; ``checked``: with two sums of every row."""
    x, out = torch.randn(ROWS, WIDTH, dtype=dtype), torch.empty(ROWS, WIDTH, dtype=torch.int32)
    seeds = [bytes([i]) * SEED_BYTES for i in range(shares)]
    v = expand(seeds[0], torch.empty(VECTORS, WIDTH, dtype=torch.int32)) if checked else None
    return both(x.numel(), lambda: share_rows(x, None, 1e5, seeds, out, v))


def combine(shares: int = 2, *, checked: bool = False) -> Case:
    """And what comes back, of so many shares."""
    parts = [expand(bytes([i]) * SEED_BYTES, torch.empty(ROWS, WIDTH, dtype=torch.int32)) for i in range(shares)]
    steps, scales, bias, out = torch.rand(ROWS, 1), torch.rand(WIDTH), torch.rand(WIDTH), torch.empty(ROWS, WIDTH)
    v = parts[0][:VECTORS].clone() if checked else None
    return both(out.numel(), lambda: combine_rows(parts, steps, scales, [bias], [out], v))


def expansion() -> Case:
    """A share of its seed, as workers make it too."""
    out = torch.empty(ROWS, WIDTH, dtype=torch.int32)
    return both(out.numel(), lambda: expand(bytes(SEED_BYTES), out))


def orthogonal(side: int) -> Case:
    """Blocks of a mask, with the numbers that they are made of."""
    stream, count = KeySchedule().fresh(1, "w").stream("A"), (1 << 19) // side**2
    return both(count * side**2, lambda: haar.orthogonal(stream, count, side, torch.float32))


KERNELS: dict[str, Callable[[], Case]] = {
    "a product, 768 to 3072 features": saved,
    "permute and scale": lambda: mask(lambda stream, size: draw(stream, size, 255)),
    "permute and scale, to bfloat16": lambda: mask(lambda stream, size: draw(stream, size, 255), torch.bfloat16),
    "permute and scale, checked": lambda: mask(lambda stream, size: draw(stream, size, 255), checked=True),
    "blocks of 16": lambda: mask(lambda stream, size: draw_blocks(stream, size, 16, 1, 1.0)),
    "blocks of 32": lambda: mask(lambda stream, size: draw_blocks(stream, size, 32, 1, 1.0)),
    "blocks of 32, checked": lambda: mask(lambda stream, size: draw_blocks(stream, size, 32, 1, 1.0), checked=True),
    "blocks of 64": lambda: mask(lambda stream, size: draw_blocks(stream, size, 64, 1, 1.0)),
    "two rounds of 32": lambda: mask(lambda stream, size: draw_blocks(stream, size, 32, 2, 1.0)),
    "orthogonal blocks of 32": lambda: orthogonal(32),
    "orthogonal blocks of 64": lambda: orthogonal(64),
    "orthogonal blocks of 256": lambda: orthogonal(256),
    "sums of rows": lambda: sums(columns=False),
    "sums of rows and columns": lambda: sums(columns=True),
    "expand a seed": expansion,
    "share": share,
    "share, bfloat16": lambda: share(torch.bfloat16),
    "share, checked": lambda: share(checked=True),
    "share among three, checked": lambda: share(shares=2, checked=True),
    "combine": combine,
    "combine, checked": lambda: combine(checked=True),
    "combine three, checked": lambda: combine(3, checked=True),
    "GELU": lambda: forward(F.gelu, hidden()),
    "GELU, gradient": lambda: backward(F.gelu, hidden()),
    "tanh-GELU": lambda: forward(tanh_gelu, hidden()),
    "tanh-GELU, gradient": lambda: backward(tanh_gelu, hidden()),
    "SiLU": lambda: forward(F.silu, hidden()),
    "SiLU, gradient": lambda: backward(F.silu, hidden()),
    "SwiGLU": lambda: forward(swiglu, hidden(), hidden()),
    "SwiGLU, gradient": lambda: backward(swiglu, hidden(), hidden()),
    "RMSNorm": lambda: forward(norm(), hidden()),
    "RMSNorm, gradient": lambda: backward(norm(), hidden()),
    "BatchNorm": lambda: forward(batch_norm, *maps(1)),
    "BatchNorm, gradient": lambda: backward(batch_norm, *maps(1)),
    "BatchNorm and ReLU": lambda: forward(batch_norm_relu, *maps(1)),
    "BatchNorm and ReLU, gradient": lambda: backward(batch_norm_relu, *maps(1)),
    "BatchNorm, residual and ReLU": lambda: forward(batch_norm_relu, *maps(2)),
    "BatchNorm, residual and ReLU, gradient": lambda: backward(batch_norm_relu, *maps(2)),
    "rotary embedding": lambda: forward(rotation(), heads(8, 32, 256, 64)[0]),
    "rotary embedding, gradient": lambda: backward(rotation(), heads(8, 32, 256, 64)[0]),
    "attention, 65 tokens": lambda: forward(F.scaled_dot_product_attention, *heads(64, 12, 65, 64)),
    "attention, 65 tokens, gradient": lambda: backward(F.scaled_dot_product_attention, *heads(64, 12, 65, 64)),
    "attention, 256 tokens": lambda: forward(F.scaled_dot_product_attention, *heads(4, 16, 256, 128)),
    "attention, 256 tokens, gradient": lambda: backward(F.scaled_dot_product_attention, *heads(4, 16, 256, 128)),
    "causal attention of groups, 256 tokens": lambda: forward(causal, *grouped(4, 32, 8, 256, 64)),
    "causal attention of groups, 256 tokens, gradient": lambda: backward(causal, *grouped(4, 32, 8, 256, 64)),
    "causal attention of groups, 2048 tokens": lambda: forward(causal, *grouped(1, 16, 4, 2048, 64)),
    "causal attention of groups, 2048 tokens, gradient": lambda: backward(causal, *grouped(1, 16, 4, 2048, 64)),
    "attention, 512 tokens": lambda: forward(F.scaled_dot_product_attention, *heads(2, 12, 512, 64)),
    "attention, 512 tokens, gradient": lambda: backward(F.scaled_dot_product_attention, *heads(2, 12, 512, 64)),
}


def measure(case: Case, repeats: int) -> dict[str, float]:
    """Nanoseconds per element of each way, least of ``repeats``, and of a copy."""
    source = torch.randn(case.elements)
    target = torch.empty_like(source)
    ways = {"native": case.native, "torch": case.torch, "copy": lambda: target.copy_(source)}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats + 1):
        for way, run in ways.items():
            start = time.process_time()
            run()
            times[way].append(time.process_time() - start)
    return {way: min(taken[1:]) / case.elements * 1e9 for way, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="kernels whose names contain one of these; default: all"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_heap()  # as every session does
    table = Table(
        "kernel", "native", "PyTorch", "a copy", "native / copy", title=f"ns per element, {kernels.selected()}"
    )
    figures = {}
    for name, make in KERNELS.items():
        if options.names and not any(part in name for part in options.names):
            continue
        found = figures[name] = measure(make(), options.repeats)
        ratio = found["native"] / found["copy"]
        table.add_row(name, *(f"{found[way]:.2f}" for way in ("native", "torch", "copy")), f"{ratio:.1f}")
    Console().print(table)
    if options.json:
        facts = {"machine": machine(), "kernels": kernels.selected(), "ns_per_element": figures}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Nanoseconds per element of one product with a block-diagonal matrix, by size and family of the blocks.

Dense blocks are what `mix` uses. The others mix as many features with fewer multiplications; what they leak has not
been measured, and reflections plainly leak more (all but a few directions of a block pass unchanged). Features lie on
axis 0, as they do between the passes of a mask, and the data stays in caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tempo.engine.memory import keep_heap
from tempo.keys import KeySchedule
from tempo.schemes import haar

WIDTH, ROWS, REPEATS = 768, 640, 60
STREAM = KeySchedule().fresh(1, "w").stream("A")


def orthogonal(count: int, side: int) -> Tensor:
    return haar.orthogonal(STREAM, count, side).float()


def dense(x: Tensor, side: int) -> Callable[[], object]:
    blocks, out = orthogonal(WIDTH // side, side), torch.empty_like(x)
    return lambda: torch.bmm(blocks, x.view(-1, side, ROWS), out=out.view(-1, side, ROWS))


def two_stages(x: Tensor, side: int, first: int) -> Callable[[], object]:
    """Dense blocks of ``first``, then across them dense ones of ``side / first`` (a Monarch matrix)."""
    second = side // first
    one, two = orthogonal(WIDTH // first, first), orthogonal(WIDTH // second, second)
    across = torch.arange(WIDTH, dtype=torch.int32).view(-1, second, first).transpose(1, 2).reshape(-1)
    out, moved = torch.empty_like(x), torch.empty_like(x)

    def run() -> None:
        torch.bmm(one, x.view(-1, first, ROWS), out=out.view(-1, first, ROWS))
        torch.index_select(out, 0, across, out=moved)
        torch.bmm(two, moved.view(-1, second, ROWS), out=out.view(-1, second, ROWS))

    return run


def rotations(x: Tensor, side: int) -> Callable[[], object]:
    """A butterfly: log2(side) stages of secret plane rotations."""
    stages = []
    half = side // 2
    while half:
        angle = torch.rand(WIDTH // (2 * half), 1, half, 1) * 6.3
        stages.append((half, angle.cos(), angle.sin()))
        half //= 2
    buffers = [torch.empty_like(x), torch.empty_like(x)]

    def run() -> None:
        source = x
        for number, (half, cosine, sine) in enumerate(stages):
            target = buffers[number % 2]
            a, b = source.view(-1, 2, half, ROWS).split(1, 1)
            left, right = target.view(-1, 2, half, ROWS).split(1, 1)
            torch.mul(a, cosine, out=left).addcmul_(b, sine, value=-1)
            torch.mul(a, sine, out=right).addcmul_(b, cosine)
            source = target

    return run


def hadamard(x: Tensor, side: int) -> Callable[[], object]:
    """One Hadamard transform and one secret diagonal of signs; a mask would need two or three of them."""
    signs = torch.randn(WIDTH, 1).sign()
    buffers = [torch.empty_like(x), torch.empty_like(x)]

    def run() -> None:
        source, half = x, side // 2
        while half:
            target = buffers[0] if source is not buffers[0] else buffers[1]
            a, b = source.view(-1, 2, half, ROWS).unbind(1)
            left, right = target.view(-1, 2, half, ROWS).unbind(1)
            torch.add(a, b, out=left)
            torch.sub(a, b, out=right)
            source, half = target, half // 2
        source.mul_(signs)

    return run


def reflections(x: Tensor, side: int, count: int) -> Callable[[], object]:
    """``count`` Householder reflections of a block, as two thin products."""
    v = orthogonal(WIDTH // side, side)[:, :, :count].contiguous()
    out, thin = torch.empty_like(x), torch.empty(len(v), count, ROWS)

    def run() -> None:
        torch.bmm(v.mT, x.view(-1, side, ROWS), out=thin)
        torch.baddbmm(x.view(-1, side, ROWS), v, thin, alpha=-2, out=out.view(-1, side, ROWS))

    return run


def families(x: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    for side in (8, 16, 32, 64, 128, 256, 768):
        yield f"dense, {side}", dense(x, side)
    for side in (32, 64, 256):
        first = {32: 8, 64: 8, 256: 16}[side]
        yield f"two stages of {first} and {side // first}, {side}", two_stages(x, side, first)
        yield f"plane rotations, {side}", rotations(x, side)
        yield f"signs and Hadamard once, {side}", hadamard(x, side)
        yield f"8 reflections, {side}", reflections(x, side, 8)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_heap()
    x = torch.randn(WIDTH, ROWS)
    print(f"{WIDTH} features × {ROWS} rows, float32, one thread, ns per element (least of {REPEATS})")
    for name, run in families(x):
        times = []
        for _ in range(REPEATS):
            start = time.thread_time()
            run()
            times.append(time.thread_time() - start)
        print(f"{name:34} {min(times) / x.numel() * 1e9:.2f}")


if __name__ == "__main__":
    main()

"""What workers that one has achieve, all at work together, at what scheme `split` asks of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Final

import torch
from torch import Tensor

from tempo.engine.link import Link as Connection
from tempo.plan.hardware import Link, Workers
from tempo.plan.models import Shape
from tempo.wire.messages import Backward, Forward, Probe, Request, Residues, Store
from tempo.wire.residues import SEED_BYTES

_WIDTH: Final = 4096
"""Features beyond which a product runs no faster."""
_LEAST_ROWS: Final = 128
_MOST_ROWS: Final = 4096
_ENOUGH: Final = 0.05
"""Seconds after which a product is long enough to be trusted."""
_BYTES: Final = 1 << 24
_REPEATS: Final = 3
_PATIENCE: Final = 120.0
"""Seconds for one answer."""

Wants = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def probe(links: Sequence[Connection], shape: Shape, bits: int) -> Workers:
    """Measure workers, with products of the model's shapes; some seconds.

    Args:
        links: One for each operator; nothing was stored there yet.
        shape: Of the model.
        bits: Of a weight.

    Raises:
        WorkerError: One of them is lost, or refuses.
    """
    alone = [link.measure() for link in links]
    download: Wants = {"y": ((_BYTES,), torch.uint8)}
    down = min(_answer(links, Probe(size=0), {}, download) for _ in range(_REPEATS))
    return Workers(
        name=" and ".join(sorted({link.welcome.device for link in links})),
        memory_gib=min(link.welcome.memory_limit for link in links) / 2**30,
        token_seconds=_token_seconds(links, shape, bits),
        link=Link(
            up=8e-9 * min(seen.upload_bytes_per_s for seen in alone),
            down=8e-9 * _BYTES * len(links) / down,
            latency=max(seen.latency_s for seen in alone),
        ),
    )


def _token_seconds(links: Sequence[Connection], shape: Shape, bits: int) -> float:
    """Of the slowest, through all products. Small ones have a rate of their own: shares are expanded, sums reduced."""
    taken = {product: _seconds(links, *product, bits) for product in dict.fromkeys(shape.products)}
    forward = sum(taken[product][0] for product in shape.products)
    return forward + sum(taken[product][1] for product in shape.backward)


def _seconds(links: Sequence[Connection], d: int, m: int, bits: int) -> tuple[float, float]:
    """Of a row, forward and backward, by the workers' own account."""
    whole, d, m = d * m, min(d, _WIDTH), min(m, _WIDTH)
    w = torch.full((m, d), (1 << (bits - 1)) - 1, dtype=torch.int8 if bits <= 8 else torch.int16)
    _answer(links, Store(step=0, layer=0, weight=1), {"w": w}, {})
    rows = _LEAST_ROWS
    _both(links, d, m, rows)  # a worker finds out which way is faster
    while True:
        forward, backward = (min(pair) for pair in zip(*(_both(links, d, m, rows) for _ in range(2)), strict=True))
        if forward + backward > _ENOUGH or 2 * rows > _MOST_ROWS:
            break
        rows *= 2
    for link in links:
        link.forget(weights=[1])
    scale = whole / (d * m) / rows
    return forward * scale, backward * scale


def _both(links: Sequence[Connection], d: int, m: int, rows: int) -> tuple[float, float]:
    """Seconds of one product with the stored weight, all workers at once, forward and backward."""
    forward = Forward(step=0, layer=0, weight=1, operand=0, product=Residues())
    backward = Backward(step=0, layer=0, weight=1, operand=0, product=Residues())
    return _computing(links, forward, "y", (rows, m)), _computing(links, backward, "dx", (rows, d))


def _computing(links: Sequence[Connection], message: Request, answer: str, shape: tuple[int, int]) -> float:
    """Seconds that the slowest says it was at work, from a seed to an answer."""
    before = [link.worker_nanoseconds for link in links]
    seed = {"seed": torch.zeros(SEED_BYTES, dtype=torch.uint8)}
    _answer(links, message, seed, {answer: (shape, torch.int32)})
    return 1e-9 * max(link.worker_nanoseconds - then for link, then in zip(links, before, strict=True))


def _answer(links: Sequence[Connection], message: Request, operands: Mapping[str, Tensor], wants: Wants) -> float:
    """Seconds until all have answered the same request."""
    started = time.perf_counter()
    asked: list[tuple[Connection, Future[Tensor] | Future[None]]] = [
        (link, future) for link in links for future in link.request(message, operands, wants).values()
    ]
    for link, future in asked:
        answer = future.result(timeout=_PATIENCE)
        if answer is not None:
            link.buffers.release(answer)
    return time.perf_counter() - started

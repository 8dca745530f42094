"""How fast a worker and the way to it are, as seen from here."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Final, final

import torch
from torch import Tensor

from tempo.errors import WorkerOutOfMemoryError
from tempo.wire.messages import Probe

if TYPE_CHECKING:
    from tempo.engine.link import Link

_PATIENCE: Final = 60.0
"""Seconds to wait for the answer to one probe."""

_ENOUGH: Final = 0.02
"""Seconds after which a probe is long enough to be trusted."""


@final
@dataclass(frozen=True, slots=True)
class Measurement:
    """What a link was seen to achieve."""

    latency_s: float
    upload_bytes_per_s: float
    download_bytes_per_s: float
    flops_per_s: float


def measure(link: Link) -> Measurement:
    """Measure ``link`` by probes that grow until they take long enough, or half of what its worker has room for.

    What others have of its memory may leave less: then the largest probe that there was room for counts.

    Raises:
        WorkerError: The worker was lost, did not answer in time, or has no room for the smallest probe.
    """
    room = link.welcome.memory_limit // 2
    latency = min(_probe(link) for _ in range(10))

    def rate(run: Callable[[int], float], amount: Callable[[int], int], size: int, limit: int) -> float:
        found = None
        while True:
            try:
                elapsed = max(min(run(size), run(size)) - latency, 1e-6)
            except WorkerOutOfMemoryError:
                if found is None:
                    raise
                return found
            found = amount(size) / elapsed
            if elapsed > _ENOUGH or 2 * size > limit:
                return found
            size *= 2

    return Measurement(
        latency_s=latency,
        upload_bytes_per_s=rate(lambda n: _probe(link, upload=n), lambda n: n, 1 << 18, min(1 << 24, room)),
        download_bytes_per_s=rate(lambda n: _probe(link, download=n), lambda n: n, 1 << 18, min(1 << 24, room)),
        flops_per_s=rate(lambda n: _probe(link, size=n), lambda n: 2 * n**3, 256, min(4096, isqrt(room // 12))),
    )


def _probe(link: Link, size: int = 0, upload: int = 0, download: int = 0) -> float:
    operands = {"x": link.buffers.empty((upload,), torch.uint8).zero_()} if upload else {}
    wants = {"y": ((download,), torch.uint8)} if download else {}
    started = time.perf_counter()
    future: Future[Tensor] | Future[None]
    for future in link.request(Probe(size=size), operands, wants).values():
        answer = future.result(timeout=_PATIENCE)
        if answer is not None:
            link.buffers.release(answer)
    return time.perf_counter() - started

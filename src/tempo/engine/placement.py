"""The planner: which products go out, and how their rows are divided among workers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from statistics import median

import torch

from tempo.engine.dtypes import WIRE_DTYPES
from tempo.engine.link import Link
from tempo.schemes.base import Scheme


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a call goes out, and why."""

    offload: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds that one offloaded call saves (its product) and costs the trusted side, and those a worker computes.

    ``mask`` includes checks of answers.
    """

    saved: float
    mask: float
    wire: float
    worker: float

    @property
    def cost(self) -> float:
        """What the trusted side pays."""
        return self.mask + self.wire


CHECK_SECONDS = 1.0e-9
"""Checking one element of an operand or answer on one core, about (docs/decisions/0014)."""

OFFLOADED = Decision(True, "offloaded")


class Planner:
    """Decides by cost on the trusted side: the matrix FLOPs saved against masking, copying and waiting for the wire.

    Args:
        placement: ``all`` sends everything that can be sent; ``auto`` what pays.
        links: The session's workers.
        checked: Whether answers are checked.

    The workers' own compute time is left out: a worker stands for a GPU, and a local CPU worker for trying things out.
    """

    def __init__(self, placement: str, links: Sequence[Link], checked: bool = True) -> None:
        self.placement = placement
        self._check_seconds = CHECK_SECONDS if checked else 0.0
        self.measurements = [link.measure() for link in links]
        self._total = sum(m.flops_per_s for m in self.measurements)
        self.shares = [m.flops_per_s / self._total for m in self.measurements]
        self.trusted_flops_per_s = measure_trusted_flops() if placement == "auto" else float("inf")
        self._decisions: dict[tuple[object, ...], Decision] = {}

    def share(self, link: Link) -> float:
        """Of one more worker, in units in which those that were there first have one together."""
        return link.measure().flops_per_s / self._total

    def decide(
        self, scheme: Scheme, x: Sequence[int], w: Sequence[int], flops: int, dtype: torch.dtype, training: bool
    ) -> Decision:
        """Place one call.

        Args:
            scheme: What would mask it.
            x: Shape of the input.
            w: Shape of the weight, output features first.
            flops: Of one pass.
            dtype: Compute dtype.
            training: Whether gradients will follow.
        """
        if self.placement == "all":
            return OFFLOADED
        key = (scheme, tuple(x), tuple(w), flops, dtype, training)
        if key not in self._decisions:
            self._decisions[key] = self._weigh(self.estimate(scheme, x, w, flops, dtype, training))
        return self._decisions[key]

    def _weigh(self, estimate: Estimate) -> Decision:
        if estimate.saved > estimate.cost:
            return OFFLOADED
        return Decision(
            False,
            f"too few FLOPs for its bytes: {estimate.saved * 1e3:.2f} ms here, "
            f"{estimate.cost * 1e3:.2f} ms to mask and send",
        )

    def estimate(
        self, scheme: Scheme, x: Sequence[int], w: Sequence[int], flops: int, dtype: torch.dtype, training: bool
    ) -> Estimate:
        """What sending one call out saves and costs the trusted side; arguments as for `decide`."""
        filled = scheme.rows_sent(x[0]) / x[0]  # with the rows that a scheme adds
        inputs = round(prod(x) * filled)
        # Every output element takes two operations per weight in its row.
        outputs = round(flops // (2 * (prod(w) // w[0])) * filled)
        # An unchanged weight is masked once, if its masks are kept.
        weights = prod(w) if training or scheme.traits.fresh_every_call else 0
        up, down = inputs + weights, outputs
        mask = inputs * scheme.mask_seconds_per_element(x[1]) + outputs * scheme.mask_seconds_per_element(w[0])
        mask += weights * scheme.mask_seconds_per_element(max(x[1], w[0]))
        mask += (inputs + outputs + weights) * self._check_seconds
        if training:  # as much again: g goes up; dx and dw come down
            up, down = up + outputs, down + inputs + weights
            mask *= 2
            # What added rows contribute to the weight gradient is computed here, and taken off.
            mask += flops * (filled - 1) / self.trusted_flops_per_s
        size = WIRE_DTYPES.get(dtype, dtype).itemsize
        passes = 3 if training else 1
        upload = sum(m.upload_bytes_per_s for m in self.measurements)
        download = sum(m.download_bytes_per_s for m in self.measurements)
        latency = max(m.latency_s for m in self.measurements) * (2 if training else 1)
        return Estimate(
            saved=flops * passes / self.trusted_flops_per_s,
            mask=mask,
            wire=size * (up / upload + down / download) + latency,
            worker=flops * filled * passes / sum(m.flops_per_s for m in self.measurements),
        )


def measure_trusted_flops(size: int = 384, repeats: int = 5) -> float:
    """Float32 matrix FLOPs per second of this process with its current threads, in about 10 ms."""
    a = torch.ones(size, size)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / median(times[1:])

"""The planner: which products go out, and how their rows are divided among workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from tempo.engine.costs import Costs, MeasuredCosts
from tempo.engine.dtypes import masked_dtype
from tempo.engine.geometry import flops, output_shape
from tempo.engine.link import Link
from tempo.schemes.base import Scheme
from tempo.settings import Settings
from tempo.verify.policy import Policy
from tempo.wire.messages import Linear, Product


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of one call, its gradients included: what the product takes here, or masks, checks, the wire, workers."""

    saved: float
    mask: float
    check: float
    wire: float
    worker: float

    @property
    def cost(self) -> float:
        """What the trusted side pays for sending it out."""
        return self.mask + self.check + self.wire

    def __str__(self) -> str:
        parts = f"masks {self.mask * 1e3:.2f}, checks {self.check * 1e3:.2f}, wire {self.wire * 1e3:.2f}"
        return f"{self.saved * 1e3:.2f} ms here, {self.cost * 1e3:.2f} ms to send out ({parts})"


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a call goes out, and why."""

    offload: bool
    reason: str
    estimate: Estimate | None = None


OFFLOADED = Decision(True, "offloaded")


class Planner:
    """Decides by cost on the trusted side: what a product takes here against masks, checks, and the wire.

    Args:
        settings: Of the session.
        links: Its workers.
        costs: What things take on this machine; None: measure it.

    The workers' own compute time is left out: a worker stands for a GPU, and a local CPU worker for trying things out.
    """

    def __init__(self, settings: Settings, links: Sequence[Link], costs: Costs | None = None) -> None:
        self.placement = settings.placement
        self._overlap, self._wire_dtype = settings.overlap, settings.wire_dtype
        self._checked = Policy(settings.verify).share
        self.measurements = [link.measure() for link in links]
        self._total = sum(m.flops_per_s for m in self.measurements)
        self.shares = [m.flops_per_s / self._total for m in self.measurements]
        self._costs = costs or MeasuredCosts(settings.wire_dtype, [link.address.operator for link in links])
        self._decisions: dict[tuple[object, ...], Decision] = {}
        self._parted: dict[tuple[object, ...], int] = {}

    def share(self, link: Link) -> float:
        """Of one more worker, in units in which those that were there first have one together."""
        return link.measure().flops_per_s / self._total

    def decide(
        self,
        scheme: Scheme,
        product: Product,
        x: tuple[int, ...],
        w: tuple[int, ...],
        dtype: torch.dtype,
        *,
        want_dx: bool,
        want_dw: bool,
    ) -> Decision:
        """Place one call, and the gradients that follow it.

        Args:
            scheme: What would mask it.
            product: What is computed.
            x: Shape of the input.
            w: Shape of the weight, output features first.
            dtype: Compute dtype.
            want_dx: Whether the input has a gradient.
            want_dw: Whether the weight has, and so changes from step to step.
        """
        if self.placement == "all":
            return OFFLOADED
        key = (scheme, product, x, w, dtype, want_dx, want_dw)
        if key not in self._decisions:
            found = self.estimate(scheme, product, x, w, dtype, want_dx=want_dx, want_dw=want_dw)
            pays = found.saved > found.cost
            self._decisions[key] = Decision(pays, f"{'pays' if pays else 'does not pay'}: {found}", found)
        return self._decisions[key]

    def estimate(
        self,
        scheme: Scheme,
        product: Product,
        x: tuple[int, ...],
        w: tuple[int, ...],
        dtype: torch.dtype,
        *,
        want_dx: bool,
        want_dw: bool,
    ) -> Estimate:
        """What sending one call out saves and costs the trusted side; arguments as for `decide`."""
        rates = self._costs.rates(scheme, product, x, w, dtype)
        filled = scheme.rows_sent(x[0]) / x[0]  # with the rows that a scheme adds
        one_pass = flops(product, x, w)
        passes = 1 + want_dx + want_dw
        inputs, outputs = prod(x) * filled, prod(output_shape(product, x, w)) * filled
        up, down = {"x": inputs}, {"y": outputs}
        if want_dw or scheme.traits.fresh_every_call:  # an unchanged weight is masked once, if its masks are kept
            up["w"] = prod(w)
        if want_dx or want_dw:
            up["g"] = outputs
        if want_dx:
            down["dx"] = inputs
        if want_dw:
            down["dw"] = prod(w)
        up, down = rates.travelling(up), rates.travelling(down)
        mask, check = rates.seconds(up | down, self._checked)
        if want_dw:  # what added rows contribute to the weight gradient is computed here, and taken off
            mask += one_pass * (filled - 1) * rates.flop
        size = masked_dtype(self._wire_dtype, dtype).itemsize
        upload = sum(m.upload_bytes_per_s for m in self.measurements)
        download = sum(m.download_bytes_per_s for m in self.measurements)
        trips = 1 + (want_dx or want_dw)
        return Estimate(
            saved=one_pass * passes * rates.flop,
            mask=mask,
            check=check,
            wire=size * (sum(up.values()) / upload + sum(down.values()) / download)
            + trips * max(m.latency_s for m in self.measurements),
            worker=one_pass * filled * passes / sum(m.flops_per_s for m in self.measurements),
        )

    def parts(
        self, scheme: Scheme, x: tuple[int, int], w: tuple[int, int], dtype: torch.dtype, *, training: bool
    ) -> int:
        """In how many parts to send the rows of a fully connected layer; arguments as for `decide`."""
        key = (scheme, x, w, dtype, training)
        if key not in self._parted:
            wanted = range(1, 5) if self._overlap == "auto" else range(1, self._overlap + 1)
            allowed = [parts for parts in wanted if scheme.may_part(x[0], parts)] or [1]
            if self._overlap == "auto" and self.placement == "all":
                allowed = [1]
            if self._overlap == "auto" and len(allowed) > 1:
                hidden, more = self._overlapping(scheme, x, w, dtype, training=training)
                allowed.sort(key=lambda parts: hidden * (1 - 1 / parts) - more * (parts - 1))
            self._parted[key] = allowed[-1]
        return self._parted[key]

    def _overlapping(
        self, scheme: Scheme, x: tuple[int, int], w: tuple[int, int], dtype: torch.dtype, *, training: bool
    ) -> tuple[float, float]:
        """Seconds that perfect overlap would hide, and those that each part but the first costs."""
        rates = self._costs.rates(scheme, Linear(), x, w, dtype)
        size = masked_dtype(self._wire_dtype, dtype).itemsize
        upload = sum(m.upload_bytes_per_s for m in self.measurements)
        download = sum(m.download_bytes_per_s for m in self.measurements)
        one_pass = flops(Linear(), x, w) / sum(m.flops_per_s for m in self.measurements)
        n = rates.travelling({"x": prod(x), "y": x[0] * w[0], "g": x[0] * w[0], "dx": prod(x)})
        there = size * (n["x"] / upload + n["y"] / download) + one_pass
        hidden = min(sum(rates.seconds({name: n[name] for name in ("x", "y")}, self._checked)), there)
        more = {"x": 0, "y": 0}
        if training:
            back = size * (n["g"] / upload + n["dx"] / download) + one_pass
            hidden += min(sum(rates.seconds({name: n[name] for name in ("g", "dx")}, self._checked)), back)
            more |= {"g": 0, "dx": 0, "dw": prod(w)}
        extra = sum(rates.seconds(more, self._checked)) + (1 + training) * max(m.latency_s for m in self.measurements)
        return hidden, extra + size * more.get("dw", 0) / download

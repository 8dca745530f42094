"""The report of what a session protects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from tempo.engine.engine import Engine
from tempo.engine.site import Site
from tempo.initial import Origin
from tempo.layers.protect import ProtectedLayer
from tempo.rendering import plain_text
from tempo.schemes.base import Scheme


@dataclass(frozen=True, slots=True)
class ProtectedModel:
    """A model under protection: by which scheme, and what its weights count as."""

    model: nn.Module
    scheme: Scheme
    origin: Origin

    def __str__(self) -> str:
        return (
            f"{type(self.model).__name__}: scheme {self.scheme.name}, base {self.origin.base} ({self.origin.why}): "
            f"{self.scheme.traits.protects}"
        )


@dataclass(frozen=True, slots=True)
class Line:
    """One layer: its forward FLOPs so far, by place, and why it ran where it did."""

    name: str
    kind: str
    offloaded: int
    trusted: int
    kept: bool
    """Whether it stays trusted in any case."""
    reason: str


class Summary:
    """What is protected, what stays trusted and why. Print it."""

    def __init__(self, engine: Engine, layers: Sequence[ProtectedLayer], models: Sequence[ProtectedModel] = ()) -> None:
        self.models = list(models)
        shared = [m.scheme for m in models if m.scheme.traits.exact]
        present = engine.crew.present
        parts = {
            number: "a share of every row" if shared else f"{engine.crew.share(number):.0%} of the rows"
            for number in present
        }
        self.workers = [
            f"{link.address} ({link.welcome.device}), {parts.get(number, 'which left')}"
            for number, link in enumerate(engine.links)
        ]
        operators = dict.fromkeys(link.address.operator for link in engine.links)  # who left may have seen shares, too
        self.colluding = ""
        if shared:
            least = max(scheme.traits.min_workers for scheme in shared)
            self.colluding = (
                f"any {least} of the operators {', '.join(operators)} would have to put together what they see"
            )
        self.lines = [_line(layer, layer.site) for layer in layers if layer.site is not None]
        self.unsupported = [f"{layer.name} ({type(layer.module).__name__})" for layer in layers if layer.site is None]

    @property
    def offloaded_share(self) -> float:
        """Share of these layers' forward FLOPs computed by workers; 0 before the first batch."""
        offloaded = sum(line.offloaded for line in self.lines)
        total = offloaded + sum(line.trusted for line in self.lines)
        return offloaded / total if total else 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        total = sum(line.offloaded + line.trusted for line in self.lines)
        for model in self.models:
            yield Text(str(model))
        table = Table("layer", "type", "where", "why")
        table.add_column("FLOPs", justify="right")
        for line in self.lines:
            flops = line.offloaded + line.trusted
            share = f"{flops / total:.1%}" if flops else "?"
            where = "workers" if line.offloaded > line.trusted else "trusted" if line.trusted or line.kept else "?"
            table.add_row(Text(line.name), line.kind, where, Text(line.reason), share)
        yield table
        if self.unsupported:
            yield Text(f"of no supported type, so trusted: {', '.join(self.unsupported)}")
        yield Text(f"workers: {'; '.join(self.workers)}")
        if self.colluding:
            yield Text(self.colluding)
        yield (
            f"{self.offloaded_share:.1%} of these layers' forward FLOPs went to workers. "
            "Attention products, softmax, norms and all else stay trusted; session.trusted_products(model) lists them."
            if total
            else "No batch has been run yet: placement is decided per call, once shapes are known."
        )

    def __str__(self) -> str:
        return plain_text(self)


def _reasons(site: Site) -> list[str]:
    """Why its calls run where they do, and why its weight is updated here although it could be on a worker."""
    return [site.keep_trusted or site.usage.reason, *(f"updated here: {reason}" for reason in site.trusted_updates)]


def _line(layer: ProtectedLayer, site: Site) -> Line:
    sites = site.sites or [site]
    usages = [site.usage for site in sites]
    return Line(
        layer.name,
        type(layer.module).__name__,
        sum(usage.offloaded for usage in usages),
        sum(usage.trusted for usage in usages),
        all(site.keep_trusted is not None for site in sites),
        "; ".join(dict.fromkeys(reason for site in sites for reason in _reasons(site))),
    )

"""``tempo bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from tempo import schemes
from tempo.bench.lora import LORA
from tempo.bench.measure import Measurement, measure
from tempo.bench.workloads import WORKLOADS
from tempo.cli.options import Json, write_json
from tempo.settings import parse

_COMPARED: Final = {"trusted": ("tempo", "mix", "mix-tuned"), "worker": ("tempo-signed", "mix")}
"""By where weights are updated: schemes whose masks allow that."""
_FROZEN: Final = ("split", "mix-tuned")
"""Where a public base is frozen: schemes that are meant for it."""


def bench(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(WORKLOADS)}.")] = "vit-small",
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Masking scheme; may be repeated.", show_default=", ".join(_COMPARED["trusted"])),
    ] = None,
    placement: Annotated[str, typer.Option(help="auto: what pays goes out; all: all that can.")] = "all",
    update: Annotated[str, typer.Option(help="Where weights are updated: trusted, worker or auto.")] = "trusted",
    wire_dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or int8.")] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each kind, at least.")] = 5,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images or sequences in a batch.", show_default="the model's")
    ] = None,
    real: Annotated[bool, typer.Option(help="Take steps with real workers on this machine, too.")] = True,
    json: Json = None,
) -> None:
    """Measure a plain step, a protected one, and the trusted side of it alone, in turn on the same cores."""
    console = Console(stderr=str(json) == "-")
    results = []
    compared = _FROZEN if model in LORA else _COMPARED["worker" if update == "worker" else "trusted"]
    for name in scheme or compared:
        # The scheme that was asked for, not one that stands in for it on a public base.
        base = "public" if schemes.create(name).traits.public_weights else "secret"
        fields = {"scheme": name, "base": base, "placement": placement, "wire_dtype": wire_dtype, "update": update}
        settings = parse(fields, "bench")
        with console.status("") as status:
            results.append(measure(model, settings, steps, status.update, batch=batch, real=real))
    console.print(_table(results))
    write_json(results, json)


def _over(size: int, least: int) -> str:
    return f"{size / 1e6:,.1f} MB, {size / least:.2f} ×" if least else "none"


def _beside_copies(seconds: float, size: int, result: Measurement) -> str:
    return f"{seconds:.3f} s ({size / result.copy_bytes_per_s:.3f})"


def _table(results: list[Measurement]) -> Table:
    first = results[0]
    table = Table(title=f"{first.description}; one thread on every side, {first.steps} steps")
    table.add_column("")
    for result in results:
        table.add_column(result.scheme, justify="right")
    rows: dict[str, Callable[[Measurement], str]] = {
        "update": lambda r: r.update,
        "steps under one mask of features": lambda r: str(r.period),
        "plain step (all in the trusted process)": lambda r: f"{r.plain_step:.3f} s",
        "protected step, real workers on this machine": lambda r: f"{r.protected_step:.3f} s",
        "trusted side alone (null worker)": lambda r: f"{r.trusted_step:.3f} s",
        "  masks and keys, with sums that check (their bytes at a copy's speed)": lambda r: _beside_copies(
            r.mask_seconds, r.mask_memory_bytes, r
        ),
        "  other checks of answers": lambda r: f"{r.verify_seconds:.3f} s",
        "  wire": lambda r: f"{r.wire_seconds:.3f} s",
        "  trusted layers, optimizer, rest (likewise)": lambda r: _beside_copies(
            r.other_seconds, r.memory_bytes - r.mask_memory_bytes, r
        ),
        "trusted_speedup (bound of an infinitely fast GPU)": lambda r: f"{r.trusted_speedup:.2f}",
        "bound by FLOPs alone (those that stay here)": lambda r: f"{r.flop_bound:.0f}",
        "bound by memory alone (least bytes here, at a copy's speed)": lambda r: f"{r.memory_bound:.1f}",
        "matrix FLOPs offloaded": lambda r: f"{r.offloaded_flops_share:.1%}",
        "bytes to workers per step": lambda r: f"{r.bytes_up / 1e6:,.1f} MB",
        "  weights": lambda r: f"{r.weight_bytes_up / 1e6:,.1f} MB",
        "  inputs and gradients, over the least possible": lambda r: _over(
            r.bytes_up - r.weight_bytes_up, r.least_bytes_up
        ),
        "bytes from workers per step": lambda r: f"{r.bytes_down / 1e6:,.1f} MB",
        "  gradients of weights": lambda r: f"{r.weight_bytes_down / 1e6:,.1f} MB",
        "  outputs and gradients, over the least possible": lambda r: _over(
            r.bytes_down - r.weight_bytes_down, r.least_bytes_down
        ),
        "encryptions per step (x, w, g)": lambda r: ", ".join(f"{n:.4g}" for n in r.encryptions.values()),
        "relative loss difference, first step": lambda r: f"{r.loss_difference:.1e}",
    }
    if first.tokens:
        rows["bytes to workers per token"] = lambda r: f"{r.bytes_up / r.tokens:,.0f}"
        rows["bytes from workers per token"] = lambda r: f"{r.bytes_down / r.tokens:,.0f}"
    if first.attention_flops:
        rows["attention, of trusted layers"] = lambda r: f"{r.attention_seconds:.3f} s"
    if first.protected_step is None:
        del rows["protected step, real workers on this machine"], rows["relative loss difference, first step"]
    for label, show in rows.items():
        table.add_row(label, *(show(result) for result in results))
    about = first.machine
    table.caption = (
        f"{about['cpu']} ({about['capability']}), torch {about['torch']}, Tempo {about['tempo']}, {about['date']}"
    )
    return table

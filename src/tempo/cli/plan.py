"""``tempo plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from tempo.cli.options import Json, write_json
from tempo.errors import SettingsError, nearest
from tempo.plan import rates as measured
from tempo.plan.estimate import Assumptions, Estimate, estimate
from tempo.plan.hardware import GPUS
from tempo.plan.models import PRESETS, Shape, find
from tempo.plan.rates import Rates

_PRICES: Final = {"core": "core_hour", "gigabyte": "gigabyte"}
"""What has a price besides GPUs, and its assumption."""
_LINKS: Final = (10.0, 100.0)
_DEFAULTS: Final = Assumptions()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` writes."""

    models: dict[str, list[Estimate]]
    rates: Rates
    assumptions: Assumptions
    gpu_hours: dict[str, float]
    """Dollars."""


def plan(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL...]", help=f"{', '.join(PRESETS)}, or a config.json.", show_default=", ".join(PRESETS)
        ),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option("--bench", help="What tempo bench --json wrote of split.", show_default="measured now"),
    ] = None,
    gpu: Annotated[list[str] | None, typer.Option(help=f"{', '.join(GPUS)}; may be repeated.")] = None,
    link: Annotated[
        list[float] | None, typer.Option(help="Gbit/s of the trusted side; may be repeated.", show_default="10, 100")
    ] = None,
    sequence: Annotated[int, typer.Option(help="Tokens in a sequence.")] = _DEFAULTS.sequence,
    cores: Annotated[int, typer.Option(help="Trusted cores.")] = _DEFAULTS.cores,
    colluders: Annotated[
        int, typer.Option(help="Operators that may collude: one less than take part.")
    ] = _DEFAULTS.colluders,
    bits: Annotated[int, typer.Option(help="Of a weight's integers.")] = _DEFAULTS.weight_bits,
    utilisation: Annotated[float, typer.Option(help="Share of a GPU's peak that is reached.")] = _DEFAULTS.utilisation,
    price: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DOLLARS",
            help=f"Of an hour of {', '.join(GPUS)} or a core, or of a gigabyte that travels; may be repeated.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Estimate LoRA of a large model under scheme split: tokens per second, bottleneck, trusted cores, cost."""
    shapes = {name: find(name) for name in models or PRESETS}
    prices = _prices(price or [])
    fields = {
        "sequence": sequence,
        "cores": cores,
        "colluders": colluders,
        "weight_bits": bits,
        "utilisation": utilisation,
        **{_PRICES[name]: dollars for name, dollars in prices.items() if name in _PRICES},
    }
    try:
        assumed = msgspec.convert(fields, Assumptions)
    except msgspec.ValidationError as error:
        raise SettingsError(f"plan: {error}") from None
    for name in (chosen := gpu or list(GPUS)):
        if name not in GPUS:
            raise SettingsError(f"plan: unknown GPU {name!r}; {nearest(name, GPUS)}")
    gpus = [msgspec.structs.replace(GPUS[name], hour=prices.get(name, GPUS[name].hour)) for name in chosen]
    if wrong := [speed for speed in link or () if not 0 < speed < float("inf")]:
        raise SettingsError(f"plan: a link of {wrong[0]:g} Gbit/s carries nothing; give a number above 0")
    console = Console(stderr=str(json) == "-")
    if bench is not None:
        rates = measured.read(bench)
    else:
        with console.status("") as status:
            rates = measured.here(status.update)
    found = Plan(
        models={
            name: [estimate(shape, one, speed, rates, assumed) for one in gpus for speed in link or _LINKS]
            for name, shape in shapes.items()
        },
        rates=rates,
        assumptions=assumed,
        gpu_hours={one.name: one.hour for one in gpus},
    )
    for name, shape in shapes.items():
        console.print(_table(name, shape, found.models[name]))
    console.print(_assumptions(found))
    write_json(found, json)


def _prices(texts: list[str]) -> dict[str, float]:
    prices = {}
    for text in texts:
        name, _, dollars = text.partition("=")
        if name not in (known := [*GPUS, *_PRICES]):
            raise SettingsError(f"plan: a price of {name!r}; {nearest(name, known)}")
        try:
            prices[name] = float(dollars)
        except ValueError:
            raise SettingsError(f"plan: price {text!r}: write {name}=0.50, in dollars") from None
        if not 0 <= prices[name] < float("inf"):
            raise SettingsError(f"plan: price {text!r}: it has to be 0 or more")
    return prices


def _table(name: str, shape: Shape, found: list[Estimate]) -> Table:
    first = found[0]
    table = Table(title=f"LoRA of {name} under scheme split; ranges: in turn – overlapped")
    table.add_column("GPUs", no_wrap=True)
    table.add_column("Gbit/s", justify="right", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column("bound by")
    table.add_column("cores\nneeded", justify="right", no_wrap=True)
    table.add_column("$ / million\ntokens", justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            f"{one.operators} × {one.gpus_per_operator} {one.gpu}",
            f"{one.link:g}",
            f"{_figure(one.tokens_per_second_in_turn)} – {_figure(one.tokens_per_second)}",
            one.bottleneck,
            f"{one.cores_needed:,}",
            f"{_figure(one.cost_in_turn)} – {_figure(one.cost)}",
        )
    table.caption = (
        f"{shape.weights / 1e9:.1f} billion frozen weights go out, {first.weight_bytes / 1e9:.0f} GB at each operator; "
        f"a token takes {first.bytes_up / 1e6:.2f} MB up, {first.bytes_down / 1e6:.2f} MB down, and "
        f"{first.trusted_seconds * 1e3:.1f} ms of one trusted core, {first.attention_seconds * 1e3:.1f} ms of it "
        "attention"
    )
    return table


def _figure(value: float) -> str:
    """To three digits, or to whole ones."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _assumptions(found: Plan) -> Table:
    assumed, rates, machine = found.assumptions, found.rates, found.rates.machine
    table = Table("measured and assumed", "", title="What this rests on")
    ways = {one.arithmetic for estimates in found.models.values() for one in estimates}
    rows: dict[str, Any] = {
        "trusted time, measured on": f"{rates.measured}; {machine.get('cpu')}, kernels {machine.get('kernels')}, "
        f"{machine.get('date')}",
        "per byte on the wire": f"{rates.per_byte * 1e9:.2f} ns: of masks, checks, adapters and trusted layers; the "
        "same for wider layers",
        "attention": f"{1e-9 / rates.per_attention_flop:.1f} GFLOP/s a core; the same for longer sequences; "
        f"{assumed.sequence:,} tokens in each",
        "trusted cores": f"{assumed.cores}; twice as many are twice as fast; needed: as many as are no bottleneck",
        "what goes out": "every frozen layer and the head, forward and back to the first; no recomputation",
        "wire": "the trusted side's link, both ways at once; no latency, no framing",
        "colluders": f"{assumed.colluders}; {assumed.colluders + 1} operators take part",
        "workers": f"weights of {assumed.weight_bits} bits; products in float64 or by limbs in int8, whichever is "
        f"faster (here {', '.join(sorted(ways))}), at {assumed.utilisation:.0%} of the published dense peak",
        "GPUs": f"of each operator as many as hold the weights in {assumed.memory_share:.0%} of their memory; they "
        "take turns, operators do not",
        "prices": ", ".join(f"{name} ${hour:.2f}/h" for name, hour in found.gpu_hours.items())
        + f", trusted core ${assumed.core_hour:.2f}/h, traffic ${assumed.gigabyte:.2f}/GB (--price changes them)",
        "overlapped, in turn": "all parts at work at once: the bound; one after the other. A real run lies between",
    }
    for label, text in rows.items():
        table.add_row(label, text)
    return table

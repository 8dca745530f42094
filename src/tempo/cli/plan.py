"""``tempo plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from tempo.cli.options import Json, addresses, write_json
from tempo.errors import SettingsError, nearest
from tempo.plan import rates as measured
from tempo.plan.estimate import Assumptions, Estimate, estimate
from tempo.plan.hardware import GPU, GPUS, Link, Workers
from tempo.plan.models import PRESETS, Shape, find
from tempo.plan.probe import probe
from tempo.plan.rates import Rates
from tempo.session import connect
from tempo.settings import parse

_PRICES: Final = {"core": "core_hour", "gigabyte": "gigabyte"}
"""What has a price besides GPUs and workers, and its assumption."""
_LATENCY: Final = 1.0
"""Milliseconds, of workers that are not there to be asked."""
_LINKS: Final = (10.0, 100.0)
_DEFAULTS: Final = Assumptions()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` writes."""

    models: dict[str, list[Estimate]]
    rates: Rates
    assumptions: Assumptions
    hours: dict[str, float]
    """Dollars for a worker, by its name."""


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
    workers: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS...", help="Measure workers that are there, one of each operator."),
    ] = None,
    link: Annotated[
        list[float] | None, typer.Option(help="Gbit/s of the trusted side; may be repeated.", show_default="10, 100")
    ] = None,
    latency: Annotated[float, typer.Option(help="Milliseconds of the least request and its answer.")] = _LATENCY,
    sequence: Annotated[int, typer.Option(help="Tokens in a sequence.")] = _DEFAULTS.sequence,
    batch: Annotated[int, typer.Option(help="Tokens that go through the model together.")] = _DEFAULTS.batch,
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
            help=f"Of an hour of {', '.join(GPUS)}, worker or core, or of a gigabyte that travels; may be repeated.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Estimate LoRA of a large model under scheme split: tokens per second, bottleneck, trusted cores, cost."""
    shapes = {name: find(name) for name in models or PRESETS}
    prices = _prices(price or [])
    fields = {
        "sequence": sequence,
        "batch": batch,
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
    for name in (chosen := gpu or ([] if workers else list(GPUS))):
        if name not in GPUS:
            raise SettingsError(f"plan: unknown GPU {name!r}; {nearest(name, GPUS)}")
    gpus = [msgspec.structs.replace(GPUS[name], hour=prices.get(name, GPUS[name].hour)) for name in chosen]
    if wrong := [speed for speed in link or () if not 0 < speed < float("inf")]:
        raise SettingsError(f"plan: a link of {wrong[0]:g} Gbit/s carries nothing; give a number above 0")
    if not 0 <= latency < float("inf"):
        raise SettingsError(f"plan: a latency of {latency:g} ms; give 0 or more")
    lines = [Link(up=speed, down=speed, latency=latency / 1e3) for speed in link or _LINKS]
    console = Console(stderr=str(json) == "-")
    if bench is not None:
        rates = measured.read(bench)
    else:
        with console.status("") as status:
            rates = measured.here(status.update)
    present = {name: _present(workers, shape, assumed, prices) for name, shape in shapes.items()} if workers else {}
    hardware: dict[str, list[tuple[GPU | Workers, Link]]] = {
        name: [(one, one.link) for one in present.get(name, [])] + [(one, line) for one in gpus for line in lines]
        for name in shapes
    }
    found = Plan(
        models={
            name: [estimate(shape, one, line, rates, assumed) for one, line in hardware[name]]
            for name, shape in shapes.items()
        },
        rates=rates,
        assumptions=assumed,
        hours={one.name: one.hour for pairs in hardware.values() for one, _ in pairs},
    )
    for name, shape in shapes.items():
        console.print(_table(name, shape, found.models[name]))
    console.print(_assumptions(found))
    write_json(found, json)


def _present(workers: list[str], shape: Shape, assumed: Assumptions, prices: dict[str, float]) -> list[Workers]:
    """Those that are there, measured with the products of a model."""
    fields = {"split_colluders": assumed.colluders, "split_weight_bits": assumed.weight_bits}
    settings = parse({"scheme": "split", "base": "public", **fields}, "plan")
    with connect(*addresses(workers), settings=settings) as session:
        seen = probe(session._engine.links, shape, assumed.weight_bits)
    return [msgspec.structs.replace(seen, hour=prices.get("worker", seen.hour))]


def _prices(texts: list[str]) -> dict[str, float]:
    prices = {}
    for text in texts:
        name, _, dollars = text.partition("=")
        if name not in (known := [*GPUS, "worker", *_PRICES]):
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
    table.add_column("workers", no_wrap=True)
    table.add_column("Gbit/s", justify="right", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column("bound by")
    table.add_column("cores\nneeded", justify="right", no_wrap=True)
    table.add_column("$ / million\ntokens", justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            f"{one.operators} × {one.workers_per_operator} {one.worker}",
            f"{one.link.up:.3g}" if one.link.up == one.link.down else f"{one.link.up:.3g} / {one.link.down:.3g}",
            f"{_figure(one.tokens_per_second_in_turn)} – {_figure(one.tokens_per_second)}",
            one.bottleneck,
            f"{one.cores_needed:,}",
            f"{_figure(one.cost_in_turn)} – {_figure(one.cost)}",
        )
    table.caption = (
        f"{shape.weights / 1e9:.2g} billion frozen weights go out, {first.weight_bytes / 1e9:.2g} GB at each operator; "
        f"a token takes {first.bytes_up / 1e6:.2f} MB up, {first.bytes_down / 1e6:.2f} MB down, and "
        f"{first.trusted_seconds * 1e3:.2f} ms of one trusted core, {first.attention_seconds * 1e3:.2f} ms of it "
        "attention"
    )
    return table


def _figure(value: float) -> str:
    """To three digits, or to whole ones."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _assumptions(found: Plan) -> Table:
    assumed, rates, machine = found.assumptions, found.rates, found.rates.machine
    table = Table("measured and assumed", "", title="What this rests on")
    every = [one for estimates in found.models.values() for one in estimates]
    ways = {one.arithmetic for one in every}
    rows: dict[str, Any] = {
        "trusted time, measured on": f"{rates.measured}; {machine.get('cpu')}, kernels {machine.get('kernels')}, "
        f"{machine.get('date')}",
        "per byte on the wire": f"{rates.per_byte * 1e9:.2f} ns: of masks, checks, adapters and trusted layers; the "
        "same for wider layers",
        "attention": f"{1e-9 / rates.per_attention_flop:.1f} GFLOP/s a core; the same for longer sequences; "
        f"{assumed.sequence:,} tokens in each",
        "trusted cores": f"{assumed.cores}; twice as many are twice as fast; needed: as many as are no bottleneck",
        "what goes out": "every frozen layer and the head, forward and back to the first; no recomputation",
        "wire": "the trusted side's link, both ways at once; one request and answer for each product and way, "
        f"of {' or '.join(dict.fromkeys(f'{one.link.latency * 1e3:.2g} ms' for one in every))}, for "
        f"{assumed.batch:,} tokens together; no framing",
        "colluders": f"{assumed.colluders}; {assumed.colluders + 1} operators take part",
        "workers": f"weights of {assumed.weight_bits} bits; GPUs multiply in float64 or by limbs in int8, whichever is "
        f"faster (here {', '.join(sorted(ways))}), at {assumed.utilisation:.0%} of the published dense peak; those "
        "that are there count as measured; of each operator as many as hold the weights in "
        f"{assumed.memory_share:.0%} of their memory; they take turns, operators do not",
        "prices": ", ".join(f"{name} ${hour:.2f}/h" for name, hour in found.hours.items())
        + f", trusted core ${assumed.core_hour:.2f}/h, traffic ${assumed.gigabyte:.2f}/GB (--price changes them)",
        "overlapped, in turn": "all parts at work at once: the bound; one after the other, as a single batch goes",
    }
    for label, text in rows.items():
        table.add_row(label, text)
    return table

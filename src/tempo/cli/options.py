"""Options that several commands share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tempo.recipes.running import Outcome

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a key of the recipe; may be repeated."),
]
Workers = Annotated[
    list[str] | None,
    typer.Option(
        "--workers",
        metavar="ADDRESS[,ADDRESS...]",
        help="Workers as \\[group:]host:port\\[@operator]; local ones are started if none are given.",
    ),
]
Plain = Annotated[bool, typer.Option("--plain", help="Compute everything here, without protection, to compare.")]

Json = Annotated[Path | None, typer.Option("--json", help="Write the figures here; - for standard output.")]


def write_json(figures: Any, path: Path | None) -> None:
    """What the option `Json` asks for."""
    text = msgspec.json.format(msgspec.json.encode(figures), indent=2).decode()
    if str(path) == "-":
        typer.echo(text)
    elif path is not None:
        path.write_text(text + "\n")


def overrides(settings: list[str] | None, workers: list[str] | None) -> list[str]:
    """The ``table.key=value`` texts that the shared options stand for."""
    addresses = [address for text in workers or () for address in text.split(",") if address]
    return [*(settings or ()), *([f"session.workers={json.dumps(addresses)}"] if addresses else [])]


def end(outcome: Outcome, console: Console, command: Sequence[str]) -> None:
    """Say where a run's results are; or, if it was interrupted, by which command it continues, and exit."""
    if not outcome.signal:
        console.print(f"done: {outcome.folder}", soft_wrap=True, highlight=False)
        return
    again = shlex.join([*command, "--resume"])
    console.print(f"interrupted; step {outcome.step} is saved. Continue with: {again}", soft_wrap=True, highlight=False)
    raise typer.Exit(128 + outcome.signal)

"""Options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

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

"""Options that several commands share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from tempo.errors import AddressError
from tempo.wire.address import Address

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
        metavar="ADDRESS...",
        help="Workers as \\[group:]host:port\\[@operator], with spaces or commas between; local ones are started if "
        "none are given.",
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


def spread(words: Sequence[str]) -> list[str]:
    """A command's words, with ``--workers A B`` written as ``--workers A --workers B``.

    Options take one value, so each address after the first, up to a word that is none, gets the option's name.
    """
    found: list[str] = []
    naming = False
    for position, word in enumerate(words):
        if word == "--":
            return [*found, *words[position:]]
        named = found[-1:] == ["--workers"]
        addresses = _are_addresses(word)
        found += ["--workers", word] if naming and addresses and not named else [word]
        naming = addresses and (naming or named)
    return found


def _are_addresses(word: str) -> bool:
    try:
        for text in filter(None, word.split(",")):
            Address.parse(text)
    except AddressError:
        return False
    return bool(word)


def overrides(settings: list[str] | None, workers: list[str] | None) -> list[str]:
    """The ``table.key=value`` texts that the shared options stand for."""
    found = addresses(workers)
    return [*(settings or ()), *([f"session.workers={json.dumps(found)}"] if found else [])]


def addresses(workers: list[str] | None) -> list[str]:
    """What the option ``--workers`` names, whether it was repeated or given commas."""
    return [address for text in workers or () for address in text.split(",") if address]


def end(outcome: Outcome, console: Console, command: Sequence[str]) -> None:
    """Say where a run's results are; or, if it was interrupted, by which command it continues, and exit."""
    if not outcome.signal:
        console.print(f"done: {outcome.folder}", soft_wrap=True, highlight=False)
        return
    again = shlex.join([*command, "--resume"])
    console.print(f"interrupted; step {outcome.step} is saved. Continue with: {again}", soft_wrap=True, highlight=False)
    raise typer.Exit(128 + outcome.signal)

"""The command ``tempo``: one file per command, imported only when that command runs.

So ``tempo worker`` never loads code that handles keys. Nothing of ours but `tempo.errors` may be imported here.
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from typer.core import TyperGroup

from tempo import __version__
from tempo.errors import ProtectionWarning, TempoError

COMMANDS: Final = {
    "train": "Train a model by a recipe, its large products computed under masks by workers.",
    "finetune": "Fine-tune a public language model on private text by LoRA, through workers.",
    "evaluate": "Measure loss and accuracy of a checkpoint on its test images, through workers.",
    "generate": "Go on from prompts by a public language model and a private adapter, through workers.",
    "predict": "Classify images with a checkpoint, through workers.",
    "worker": "Serve products to trusted processes; runs on the untrusted machine.",
    "keygen": "Make a key pair for connections to other machines.",
    "audit": "Attack what workers recorded, and report what they learned.",
    "doctor": "Check that workers are reachable, and what gain to expect.",
    "profile": "Record one training step: where its time goes, here, on the wire and on workers.",
    "plan": "Estimate LoRA of a large model on rented GPUs: tokens per second, bottleneck, cost.",
    "bench": "Measure protected against plain training on this machine.",
}


class _Lazy(TyperGroup):
    """Lists commands from `COMMANDS`, and loads the one that is run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, listed, rest = super().resolve_command(ctx, args)
        if name not in COMMANDS:
            return name, listed, rest
        single = typer.Typer(add_completion=False)
        single.command(name, help=COMMANDS[name])(getattr(import_module(f"tempo.cli.{name}"), name))
        if "--workers" in rest:
            rest = import_module("tempo.cli.options").spread(rest)
        return name, typer.main.get_command(single), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (TempoError, OSError) as error:  # an OSError names its file: a full disk, a folder that is not ours
            if os.environ.get("TEMPO_DEBUG") == "1":
                raise
            console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
            console.print(f"error: {error}")
            for note in getattr(error, "__notes__", ()):
                console.print(note)
            raise typer.Exit(1) from None


app = typer.Typer(name="tempo", cls=_Lazy, no_args_is_help=True, pretty_exceptions_show_locals=False)


def _listed() -> None:
    """Stands for a command until it is loaded."""


for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(_listed)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tempo {__version__}")
        raise typer.Exit


@app.callback()
def _tempo(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Train and run neural networks on GPUs that nobody has to trust."""


_python_format = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings are for the person at the keyboard: they say what, not where in our source."""
    if issubclass(category, ProtectionWarning):
        return f"warning: {message}\n"
    return _python_format(message, category, filename, lineno, line)


def main() -> None:
    """Run the command line."""
    # The trusted process and local workers take turns on the same cores: idle OpenMP threads that spin, as they do by
    # default, keep the other from working (measured: 30 against 700 samples/s on busy cores). Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.formatwarning = _format_warning
    app()

"""``tempo train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tempo.cli.options import Overrides, Plain, Workers, end, overrides
from tempo.recipes import recipe as recipes
from tempo.recipes.comparison import compare
from tempo.recipes.train import train as run


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.", show_default=False)],
    settings: Overrides = None,
    workers: Workers = None,
    scheme: Annotated[str | None, typer.Option(help="Masking scheme.", show_default="the recipe's")] = None,
    verify: Annotated[
        str | None, typer.Option(help="Check answers: always, sample:P or off.", show_default="the recipe's")
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(help="Where weights are updated: trusted, worker or auto.", show_default="the recipe's"),
    ] = None,
    patience: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds to wait for a lost worker where none is left.", show_default="the recipe's"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to train.", show_default="the recipe's")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/RECIPE")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    plain: Plain = False,
    insecure_no_tls: Annotated[
        bool, typer.Option("--insecure-no-tls", help="Speak to remote workers in clear.")
    ] = False,
    insecure_record_truth: Annotated[
        Path | None, typer.Option(help="Folder for plain operands and masks, to score audits.", show_default=False)
    ] = None,
) -> None:
    """Train by a recipe."""
    console = Console()
    changes = overrides(settings, workers)
    if verify is not None:
        changes.append(f'session.verify="{verify}"')
    if update is not None:
        changes.append(f'session.update="{update}"')
    if patience is not None:
        changes.append(f"session.patience={patience}")
    if scheme is not None:
        changes.append(f"session.scheme={scheme}")
    if steps is not None:
        changes += [f"run.steps={steps}", "run.epochs=0"]
    if out is not None:
        changes.append(f"run.out={out}")
    if insecure_no_tls:
        changes.append("session.insecure_no_tls=true")
    if insecure_record_truth is not None:
        changes.append(f"session.insecure_record_truth={insecure_record_truth}")
    job = recipes.load(recipe, changes)

    outcome = run(
        job, console, resume=resume, plain=plain, title=f"{job.model.__struct_config__.tag} on {job.data.source}"
    )
    if not outcome.signal and job.run.compare_plain and not plain:
        outcome = compare(job, console, outcome, resume=resume)
    again = ["tempo", "train", str(recipe), *(f"--set={change}" for change in changes), *(["--plain"] if plain else [])]
    end(outcome, console, again)

"""``tempo evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tempo.cli.options import Overrides, Plain, Workers, overrides
from tempo.recipes import data, inference


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run.", show_default=False)],
    settings: Overrides = None,
    workers: Workers = None,
    plain: Plain = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a checkpoint on its test images."""
    trained = inference.load(checkpoint, overrides(settings, workers))
    options = trained.recipe.data
    test = data.load(options.source, options.train_limit, options.test_limit).test
    with inference.protected(trained.model, trained.recipe.session, plain):
        loss, accuracy = inference.evaluate(trained.model, test, trained.format, options.batch_size)
    if as_json:
        step = trained.checkpoint.step
        typer.echo(json.dumps({"step": step, "images": len(test), "loss": loss, "accuracy": accuracy}))
    else:
        typer.echo(
            f"{trained.checkpoint.path}: {len(test)} test images of {options.source}: "
            f"loss {loss:.4f}  accuracy {accuracy:.1%}"
        )

"""``tempo predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from tempo.cli.options import Overrides, Plain, Workers, overrides
from tempo.recipes import inference
from tempo.recipes.models import logits


def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run.", show_default=False)],
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="Images (PNG, JPEG) or .npy arrays.", show_default=False)
    ],
    settings: Overrides = None,
    workers: Workers = None,
    plain: Plain = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per image, with all classes.")] = False,
) -> None:
    """Classify images."""
    trained = inference.load(checkpoint, overrides(settings, workers))
    pictures = [(file, inference.picture(file, trained.format)) for file in inputs]
    names = [f"{file}[{i}]" if len(images) > 1 else str(file) for file, images in pictures for i in range(len(images))]
    numbers = torch.cat([trained.format.numbers(images) for _, images in pictures])
    with inference.protected(trained.model, trained.recipe.session, plain), torch.no_grad():
        batches = numbers.split(trained.recipe.data.batch_size)
        shares = torch.cat([logits(trained.model, batch) for batch in batches]).softmax(1)
    for name, share in zip(names, shares):
        best = int(share.argmax())
        label = trained.format.classes[best]
        if as_json:
            classes = dict(zip(trained.format.classes, share.tolist()))
            typer.echo(json.dumps({"input": name, "class": label, "probability": float(share[best]), "all": classes}))
        else:
            typer.echo(f"{name}: {label} ({share[best]:.1%})")

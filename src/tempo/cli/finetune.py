"""``tempo finetune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tempo.cli.options import Overrides, Plain, Workers, end, overrides
from tempo.recipes import table
from tempo.recipes.finetune import tuning
from tempo.recipes.finetune.finetune import finetune as run


def _option(key: str, text: str, default: str = "") -> Any:
    """The option that stands for ``table.key`` of a `Tuning`."""
    return typer.Option(help=text, show_default=default or tuning.default(key))


def finetune(
    base: Annotated[
        str, typer.Argument(help="The public base: a folder in Hugging Face's format, or OWNER/NAME on the hub.")
    ],
    data: Annotated[
        Path,
        typer.Argument(help="The private text, JSON lines of 'text', of 'prompt' and 'completion', or of 'messages'."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter, checkpoints and metrics.")] = Path("adapter"),
    workers: Workers = None,
    scheme: Annotated[str | None, _option("session.scheme", "Masking scheme.")] = None,
    rank: Annotated[int | None, _option("model.rank", "Rank of the adapter.")] = None,
    alpha: Annotated[float | None, _option("model.alpha", "Its output is multiplied by alpha / rank.")] = None,
    targets: Annotated[
        str | None, _option("model.targets", "Layers that get one, by the ends of their names: q_proj,v_proj.")
    ] = None,
    lr: Annotated[float | None, _option("optimizer.lr", "Learning rate at its highest.")] = None,
    epochs: Annotated[int | None, _option("run.epochs", "Times through the data.")] = None,
    steps: Annotated[int | None, _option("run.steps", "Steps, instead of epochs.", "the epochs'")] = None,
    batch_size: Annotated[int | None, _option("data.batch_size", "Sequences per step.")] = None,
    accumulation: Annotated[
        int | None, _option("data.accumulation", "Parts in which a batch is computed, to save memory.")
    ] = None,
    length: Annotated[int | None, _option("data.length", "Tokens of a sequence, at most.")] = None,
    validation: Annotated[float | None, _option("data.validation", "Share of the lines to measure on.")] = None,
    evaluate_every: Annotated[
        int | None, _option("run.evaluate_every", "Steps between evaluations.", "an epoch's")
    ] = None,
    stop_after: Annotated[
        int | None, _option("run.stop_after", "Stop after so many evaluations without a lower loss; 0: never.")
    ] = None,
    prompt: Annotated[
        str | None, _option("run.prompt", "What a sample goes on from, at each evaluation.", "how a line begins")
    ] = None,
    seed: Annotated[int | None, _option("run.seed", "Of the adapter, and of the order of the data.")] = None,
    settings: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    plain: Plain = False,
    insecure_no_tls: Annotated[
        bool, typer.Option("--insecure-no-tls", help="Speak to remote workers in clear.")
    ] = False,
) -> None:
    """Fine-tune by LoRA."""
    given = {
        "model.base": base,
        "data.file": str(data),
        "run.out": str(out),
        "session.scheme": scheme,
        "model.rank": rank,
        "model.alpha": alpha,
        "model.targets": targets,
        "optimizer.lr": lr,
        "run.epochs": epochs,
        "run.steps": steps,
        "data.batch_size": batch_size,
        "data.accumulation": accumulation,
        "data.length": length,
        "data.validation": validation,
        "run.evaluate_every": evaluate_every,
        "run.stop_after": stop_after,
        "run.prompt": prompt,
        "run.seed": seed,
        "session.insecure_no_tls": insecure_no_tls or None,
    }
    changes = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]
    changes += overrides(settings, workers)
    console = Console()
    outcome = run(tuning.parse(table.override({}, changes), "tempo finetune"), console, resume=resume, plain=plain)
    again = ["tempo", "finetune", base, str(data), *(f"--set={change}" for change in changes)]
    end(outcome, console, [*again, *(["--plain"] if plain else [])])

"""``tempo generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from tempo.cli.options import Overrides, Plain, Workers, overrides
from tempo.recipes import table
from tempo.recipes.finetune.base import load_adapted, load_base, load_tokenizer, most_tokens
from tempo.recipes.finetune.examples import chat, start
from tempo.recipes.finetune.sampling import TOP_P, continuation
from tempo.recipes.finetune.tuning import DEFAULTS
from tempo.recipes.inference import protected
from tempo.recipes.recipe import Session


class Generation(table.Table, frozen=True):
    """What ``--set`` may change."""

    session: Session


def generate(
    base: Annotated[
        str, typer.Argument(help="The public base: a folder in Hugging Face's format, or OWNER/NAME on the hub.")
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT...]", help="What to go on from; none: standard input's lines."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of an adapter, as `tempo finetune` stores it.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add, at most.")] = 64,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the likeliest tokens to draw from; 0: the likeliest one.")
    ] = TOP_P,
    chats: Annotated[bool, typer.Option("--chat", help="Lay prompts out by the base's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    workers: Workers = None,
    settings: Overrides = None,
    plain: Plain = False,
) -> None:
    """Generate text."""
    values = table.override({"session": DEFAULTS["session"]}, overrides(settings, workers))
    told = table.convert(values, Generation, "tempo generate")
    tokenizer = load_tokenizer(base)
    model = load_base(base).requires_grad_(False) if adapter is None else load_adapted(base, adapter)
    torch.manual_seed(seed)
    with protected(model, told.session, plain):
        for prompt in prompts or (line.rstrip("\n") for line in sys.stdin):
            text, first = prompt, start(tokenizer)
            if chats:
                text, first = chat([{"role": "user", "content": prompt}], tokenizer, base, answer=True), []
            ids = torch.tensor([[*first, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
            found = continuation(model, tokenizer, ids, tokens, most_tokens(model), top_p)
            typer.echo(tokenizer.decode(found[0], skip_special_tokens=True))

"""What a fine-tuning run is told: its base, data, adapter and how it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from tempo.errors import SettingsError
from tempo.recipes import table
from tempo.recipes.optimizers import AdamW, Cosine, Fraction, NotNegative, Schedule
from tempo.recipes.recipe import Count, Limit, Session
from tempo.recipes.table import Table

DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "optimizer": {"lr": 2e-4, "weight_decay": 0.0},
    "schedule": {"name": "cosine"},
    "session": {"scheme": "split", "base": "public"},
}
"""Where fine-tuning differs from what the tables' own defaults say."""


class Model(Table, frozen=True):
    """The ``[model]`` table: a public base, and the adapter on it."""

    base: str
    """Folder of a causal language model in Hugging Face's format, weights in safetensors; or its name on the hub."""

    rank: Count = 16
    alpha: Annotated[float, Meta(gt=0)] = 32.0
    """The adapter's output is multiplied by ``alpha / rank``."""

    dropout: Fraction = 0.0
    targets: str = "all-linear"
    """Layers that get an adapter: all linear ones but the last, or the ends of their names (``q_proj,v_proj``)."""

    rslora: bool = False
    """Divide by the root of the rank, not by the rank."""

    dora: bool = False
    """Weight-decomposed adapters (DoRA)."""

    gradient_checkpointing: bool = False
    """Compute each block again on the way back, instead of keeping what is in it: less memory, more work."""


class Data(Table, frozen=True):
    """The ``[data]`` table."""

    file: str
    """JSON lines; see `tempo.recipes.finetune.records`."""

    validation: Annotated[float, Meta(ge=0, le=0.5)] = 0.1
    """Share of the lines that is kept apart, to measure on; 0: none."""

    batch_size: Count = 8
    accumulation: Count = 1
    """Parts in which a batch is computed, one after the other: less memory, the same step."""

    length: Annotated[int, Meta(ge=2)] = 512
    """Tokens of a sequence, at most: longer ones are cut; plain text is laid end to end and cut into such pieces."""

    pad_to: Count = 64
    """Sequences are padded to a multiple of so many tokens, so that workers see lengths only in such steps."""


class Run(Table, frozen=True):
    """The ``[run]`` table."""

    epochs: Limit = 3
    steps: Limit = 0
    """Steps to train, instead of epochs; 0: as many as the epochs have."""

    seed: Annotated[int, Meta(ge=0, lt=1 << 32)] = 0
    clip_norm: NotNegative = 1.0
    """Scale gradients down to this norm; 0: leave them."""

    checkpoint_every: Limit = 100
    """Steps between checkpoints; 0: only at the end and when interrupted."""

    evaluate_every: Limit = 0
    """Steps between evaluations on what was kept apart, the first before the first step; 0: one for each epoch."""

    stop_after: Limit = 3
    """Stop when so many evaluations in a row brought no lower loss; 0: never."""

    prompt: str = ""
    """What to go on from in the sample that is shown after each evaluation; empty: how a line kept apart begins."""

    sample_tokens: Limit = 64
    """Length of that sample; 0: none."""

    out: str = "adapter"
    """Folder for the adapter, checkpoints and metrics."""


class Tuning(Table, frozen=True):
    """All of it."""

    model: Model
    data: Data
    optimizer: AdamW
    schedule: Schedule
    session: Session
    run: Run = Run()


def parse(values: Mapping[str, Any], where: str) -> Tuning:
    """Turn plain tables into a `Tuning`, over `DEFAULTS`; ``where`` names their source in errors.

    Raises:
        SettingsError: Something in it is unknown, missing or does not fit.
    """
    filled = {name: dict(values.get(name, {})) for name in {**DEFAULTS, **values}}
    for name, defaults in DEFAULTS.items():
        if filled[name].get("name", defaults.get("name")) == defaults.get("name"):
            filled[name] = {**defaults, **filled[name]}
    tuning = table.convert(filled, Tuning, where)
    if not (tuning.run.steps or tuning.run.epochs):
        raise SettingsError(f"{where}: [run]: give steps or epochs, above 0")
    return tuning


def differences(tuning: Tuning, earlier: Tuning) -> list[str]:
    """What keeps a run by ``tuning`` from continuing one by ``earlier`` exactly, line by line."""
    length = ("steps", "epochs") if isinstance(tuning.schedule, Cosine) else ()
    run = ("seed", "clip_norm", "evaluate_every", "stop_after", *length)
    return table.differences(
        tuning, earlier, {"data": None, "model": None, "optimizer": None, "schedule": None, "run": run}
    )


def default(name: str) -> str:
    """The default of ``table.key``, for the help text."""
    table_name, _, key = name.partition(".")
    if key in DEFAULTS.get(table_name, {}):
        return str(DEFAULTS[table_name][key])
    kinds = {field.name: field.type for field in msgspec.structs.fields(Tuning)}
    return str(next(field.default for field in msgspec.structs.fields(kinds[table_name]) if field.name == key))

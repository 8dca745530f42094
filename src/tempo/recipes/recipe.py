"""The recipe: one TOML file that says what to train, on what, how, and under which protection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tempo.errors import SettingsError
from tempo.recipes import table
from tempo.recipes.models import Model
from tempo.recipes.optimizers import AdamW, Constant, Cosine, Optimizer, Schedule
from tempo.recipes.table import Table
from tempo.settings import Settings

Count = Annotated[int, Meta(ge=1)]
Limit = Annotated[int, Meta(ge=0)]


class Data(Table, frozen=True):
    """The ``[data]`` table."""

    source: str = "digits"
    """Name of a data source: `tempo.recipes.data.SOURCES`."""

    batch_size: Count = 64
    train_limit: Limit = 0
    """Use only so many training images; 0: all of them."""

    test_limit: Limit = 0
    """Use only so many test images; 0: all of them."""

    resize: Limit = 0
    """Scale images to so many pixels; 0: leave them as they are."""

    augment: tuple[Literal["flip", "crop"], ...] = ()
    """Random changes to training images: mirrored, or shifted by up to an eighth."""


class Run(Table, frozen=True):
    """The ``[run]`` table."""

    steps: Limit = 0
    epochs: Limit = 0
    seed: Annotated[int, Meta(ge=0, lt=1 << 32)] = 0
    clip_norm: Annotated[float, Meta(ge=0)] = 0.0
    """Scale gradients down to this norm; 0: leave them."""

    checkpoint_every: Limit = 0
    """Steps between checkpoints; 0: only at the end and when interrupted."""

    evaluate_every: Limit = 0
    """Steps between evaluations on the test images; 0: only at the end."""

    out: str = ""
    """Folder for checkpoints and metrics; empty: ``runs/`` and the recipe's name."""

    compare_plain: bool = False
    """Train again without protection from the same weights afterwards, and draw ``report.png``."""


class Session(Settings, frozen=True):
    """The ``[session]`` table: the settings of `tempo.connect`, and the workers to connect to.

    The weights that a recipe starts from depend on its seed alone, so a worker that knows the recipe knows them:
    ``base = "secret"`` makes them secret (`tempo.secret_initialisation`), anything else leaves them a public base.
    """

    workers: tuple[str, ...] = ()


class Recipe(Table, frozen=True):
    """A whole recipe."""

    model: Model
    data: Data = Data()
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Constant()
    run: Run = Run()
    session: Session = Session()

    def steps(self, images: int) -> int:
        """How many steps the run takes over ``images`` training images."""
        return self.run.steps or self.run.epochs * (images // self.data.batch_size)


def load(file: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        file: The TOML file.
        overrides: ``table.key=value`` texts that win over the file.

    Raises:
        SettingsError: The file cannot be read, or something in it is unknown or does not fit.
    """
    values = table.read(file, overrides)
    run = values.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("out", str(Path("runs") / file.stem))
    return parse(values, str(file))


def parse(values: Mapping[str, Any], where: str) -> Recipe:
    """Turn plain tables into a recipe; ``where`` names their source in errors."""
    recipe = table.convert(values, Recipe, where)
    if bool(recipe.run.steps) == bool(recipe.run.epochs):
        raise SettingsError(f"{where}: [run]: give either steps or epochs, above 0")
    return recipe


def changed(recipe: Recipe, values: Mapping[str, Any], where: str) -> Recipe:
    """A copy of ``recipe`` with the tables in ``values`` updated."""
    tables: dict[str, Any] = msgspec.to_builtins(recipe)
    return parse({name: {**tables[name], **values.get(name, {})} for name in tables}, where)


def differences(recipe: Recipe, earlier: Recipe) -> list[str]:
    """What keeps a run by ``recipe`` from continuing one by ``earlier`` exactly, as ``table.key: now, then`` lines."""
    # A cosine depends on its length, a constant schedule may simply go on for longer.
    run = ("seed", "clip_norm", *(("steps", "epochs") if isinstance(recipe.schedule, Cosine) else ()))
    return table.differences(
        recipe, earlier, {"data": None, "model": None, "optimizer": None, "schedule": None, "run": run}
    )

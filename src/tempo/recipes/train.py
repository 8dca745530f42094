"""The main job: an ordinary training loop, whose model happens to compute its products on workers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import torch
from rich.console import Console

from tempo.checkpoint import Checkpoint, CheckpointStore
from tempo.errors import TempoError, WeightsLostError
from tempo.recipes import data
from tempo.recipes import recipe as recipes
from tempo.recipes.inference import FOLDER, evaluate, protected, recipe_of
from tempo.recipes.job import Job, Moment, one_step
from tempo.recipes.metrics import Evaluation, Metrics, Step
from tempo.recipes.progress import Display
from tempo.recipes.recipe import Recipe, differences
from tempo.recipes.running import Interrupts, Outcome, continued, make_way, placed, save_after

MOST_TURNS: Final = 10
"""How often a run goes back to one and the same checkpoint because workers lost weights, before it gives up."""

INITIAL: Final = "initial"
"""Where a run that will be compared with a plain one keeps its secret initial weights, in its folder."""


def train(
    recipe: Recipe,
    console: Console,
    *,
    resume: bool = False,
    plain: bool = False,
    title: str = "training",
    initial: Mapping[str, torch.Tensor] | None = None,
) -> Outcome:
    """Train by ``recipe``.

    Args:
        recipe: What to do.
        console: Where to show progress.
        resume: Continue from the newest checkpoint in the run's folder.
        plain: Compute everything here, for comparison, without a session.
        title: Name of the run on the display.
        initial: State of the model to start from, instead of what the seed gives.

    Raises:
        TempoError: Something went wrong; if training had begun, a checkpoint was saved, as a note on the error says.
    """
    folder = Path(recipe.run.out)
    store = CheckpointStore(folder / FOLDER)
    earlier = continued(store, console, lambda found: differences(recipe, recipe_of(found))) if resume else None
    source = data.load(recipe.data.source, recipe.data.train_limit, recipe.data.test_limit)
    job = Job(recipe, source, earlier, initial, secret=recipe.session.base == "secret" and not plain)
    settings, trusted = _as_before(recipe.session, earlier)
    with protected(job.model, settings, plain, trusted) as session:
        if earlier is None:
            make_way(folder, console)
            if job.base == "secret" and recipe.run.compare_plain:
                _save_initial(folder, job.model)
        display = Display(console, title, job.step, job.steps, recipe.data.batch_size)
        with Metrics(folder, job.step) as metrics, display, Interrupts() as interrupts:
            job.session = session
            if session is not None:
                session.optimizer(job.optimizer)
            outcome = _loop(job, store, metrics, display, interrupts)
        if session is not None:
            (folder / "summary.txt").write_text(f"{session.summary()}\n", encoding="utf-8")
        return outcome


def _loop(job: Job, store: CheckpointStore, metrics: Metrics, display: Display, interrupts: Interrupts) -> Outcome:
    job.generators.restore()
    job.moment = Moment(job)
    began = time.perf_counter() - job.elapsed
    if job.recipe.session.update != "trusted":
        job.save_once(store)  # somewhere to go back to
    try:
        while True:
            try:
                _steps(job, began, store, metrics, display, interrupts)
                job.save_once(store)
                final = None if interrupts.signal else _evaluate(job, began, metrics, display, interrupts)
                break
            except WeightsLostError as error:
                _go_back(job, error, store, metrics, display)
    except TempoError as error:
        job.moment.restore()
        save_after(error, lambda: job.save_once(store), store)
        raise
    if final is None:
        return Outcome(Path(job.recipe.run.out), job.step, interrupts.signal)
    return Outcome(Path(job.recipe.run.out), job.step, 0, final.loss, final.accuracy)


def _steps(
    job: Job, began: float, store: CheckpointStore, metrics: Metrics, display: Display, interrupts: Interrupts
) -> None:
    while job.step < job.steps and not interrupts.signal:
        job.moment = Moment(job)
        record = one_step(job, began)
        job.elapsed = record.time
        _report(job, record, metrics, display)
        if job.due(job.recipe.run.checkpoint_every):
            job.save(store)
        if job.due(job.recipe.run.evaluate_every):
            _evaluate(job, began, metrics, display, interrupts)


def _go_back(job: Job, error: WeightsLostError, store: CheckpointStore, metrics: Metrics, display: Display) -> None:
    """Load the last checkpoint, and go on from there without the worker that took weights with it."""
    earlier = store.load()
    if earlier.step <= job.back_at:
        job.turns += 1
    else:
        job.back_at, job.turns = earlier.step, 1
    if job.turns > MOST_TURNS:
        raise error
    display.note(f"{error}\ngoing back to step {earlier.step}")
    job.go_back(earlier)
    metrics.go_back(job.step)


def _report(job: Job, record: Step, metrics: Metrics, display: Display) -> None:
    metrics.write(record)
    if job.session is not None and not job.placed:
        display.note(placed(job.session.summary()))
        job.placed = True
    display.step(record)


def _evaluate(job: Job, began: float, metrics: Metrics, display: Display, interrupts: Interrupts) -> Evaluation | None:
    """Evaluate on the test images, unless interrupted."""
    test, batch_size = job.source.test, job.recipe.data.batch_size
    loss, accuracy = evaluate(job.model, test, job.format, batch_size, lambda: interrupts.signal != 0)
    if interrupts.signal:
        return None
    evaluation = Evaluation(job.step, loss, accuracy, time.perf_counter() - began)
    metrics.write(evaluation)
    display.evaluation(evaluation)
    return evaluation


def _as_before(settings: recipes.Session, earlier: Checkpoint | None) -> tuple[recipes.Session, list[str]]:
    """Settings and layers to keep trusted that mask and place every layer as ``earlier`` did, whatever holds today."""
    if earlier is None:
        return settings, []
    settings = msgspec.structs.replace(settings, base=earlier.state.get("base", "public"))
    if earlier.state.get("trusted") is None:
        return settings, []
    return msgspec.structs.replace(settings, placement="all"), earlier.state["trusted"]


def _save_initial(folder: Path, model: torch.nn.Module) -> None:
    """Keep secret initial weights, which no seed gives again, for the comparison in plain."""
    CheckpointStore(folder / INITIAL).save(0, {"model": model.state_dict()}, {})

"""The main job: an ordinary training loop, whose model happens to compute its products on workers."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, final

import msgspec
import torch
from rich.console import Console

from tempo.checkpoint import Checkpoint, CheckpointStore
from tempo.errors import CheckpointError, NonFiniteError, SettingsError, TempoError, WeightsLostError
from tempo.recipes import data
from tempo.recipes import recipe as recipes
from tempo.recipes.inference import FOLDER, evaluate, protected, recipe_of
from tempo.recipes.job import Job, Moment, one_step
from tempo.recipes.metrics import Evaluation, Metrics, Step
from tempo.recipes.progress import Display
from tempo.recipes.recipe import Recipe, differences

if TYPE_CHECKING:
    from tempo.summary import Summary

MOST_TURNS: Final = 10
"""How often a run goes back to one and the same checkpoint because workers lost weights, before it gives up."""

INITIAL: Final = "initial"
"""Where a run that will be compared with a plain one keeps its secret initial weights, in its folder."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    step: int
    signal: int = 0
    """What interrupted it; 0: nothing, it is complete."""

    loss: float = math.nan
    accuracy: float = math.nan


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
    earlier = _earlier(store, recipe, console) if resume else None
    source = data.load(recipe.data.source, recipe.data.train_limit, recipe.data.test_limit)
    job = Job(recipe, source, earlier, initial, secret=recipe.session.base == "secret" and not plain)
    settings, trusted = _as_before(recipe.session, earlier)
    with protected(job.model, settings, plain, trusted) as session:
        if earlier is None:
            _make_way(folder, console)
            if job.base == "secret" and recipe.run.compare_plain:
                _save_initial(folder, job.model)
        display = Display(console, title, job.step, job.steps, recipe.data.batch_size)
        with Metrics(folder, job.step) as metrics, display, _Interrupts() as interrupts:
            job.session = session
            if session is not None:
                session.optimizer(job.optimizer)
            outcome = _loop(job, store, metrics, display, interrupts)
        if session is not None:
            (folder / "summary.txt").write_text(f"{session.summary()}\n", encoding="utf-8")
        return outcome


def _loop(job: Job, store: CheckpointStore, metrics: Metrics, display: Display, interrupts: _Interrupts) -> Outcome:
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
        _save_after(error, job, store)
        raise
    if final is None:
        return Outcome(Path(job.recipe.run.out), job.step, interrupts.signal)
    return Outcome(Path(job.recipe.run.out), job.step, 0, final.loss, final.accuracy)


def _steps(
    job: Job, began: float, store: CheckpointStore, metrics: Metrics, display: Display, interrupts: _Interrupts
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
        display.note(_placed(job.session.summary()))
        job.placed = True
    display.step(record)


def _evaluate(job: Job, began: float, metrics: Metrics, display: Display, interrupts: _Interrupts) -> Evaluation | None:
    """Evaluate on the test images, unless interrupted."""
    test, batch_size = job.source.test, job.recipe.data.batch_size
    loss, accuracy = evaluate(job.model, test, job.format, batch_size, lambda: interrupts.signal != 0)
    if interrupts.signal:
        return None
    evaluation = Evaluation(job.step, loss, accuracy, time.perf_counter() - began)
    metrics.write(evaluation)
    display.evaluation(evaluation)
    return evaluation


@final
class _Interrupts:
    """Turns Ctrl-C and SIGTERM into a flag while inside, so that the step in progress is finished and saved."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:  # asked twice: at once, then, without a checkpoint
            raise KeyboardInterrupt
        self.signal = number


def _earlier(store: CheckpointStore, recipe: Recipe, console: Console) -> Checkpoint:
    """The checkpoint to continue from, if it is of the same run."""
    if not store.steps():
        raise CheckpointError(f"nothing to resume in {store.folder}: leave out --resume to start")
    earlier = store.load()
    for message in earlier.damaged:
        console.print(f"[yellow]passed over:[/] {message}", soft_wrap=True)
    if found := differences(recipe, recipe_of(earlier)):
        lines = "".join(f"\n  {line}" for line in found)
        raise SettingsError(
            f"{earlier.path} was made by another recipe, and a resumed run must continue exactly:{lines}\n"
            "change that back, or start a new run with another --out"
        )
    console.print(f"continuing from {earlier.path}", soft_wrap=True, highlight=False)
    return earlier


def _as_before(settings: recipes.Session, earlier: Checkpoint | None) -> tuple[recipes.Session, list[str]]:
    """Settings and layers to keep trusted that mask and place every layer as ``earlier`` did, whatever holds today."""
    if earlier is None:
        return settings, []
    settings = msgspec.structs.replace(settings, base=earlier.state.get("base", "public"))
    if earlier.state.get("trusted") is None:
        return settings, []
    return msgspec.structs.replace(settings, placement="all"), earlier.state["trusted"]


def _placed(summary: Summary) -> str:
    """What masks the model, and where its layers went."""
    sent = sum(1 for line in summary.lines if line.offloaded)
    return (
        f"{'; '.join(map(str, summary.models))}\n"
        f"{sent} of {len(summary.lines)} layers, {summary.offloaded_share:.1%} of their FLOPs, go to "
        f"{'; '.join(summary.workers)}"
    )


def _save_initial(folder: Path, model: torch.nn.Module) -> None:
    """Keep secret initial weights, which no seed gives again, for the comparison in plain."""
    CheckpointStore(folder / INITIAL).save(0, {"model": model.state_dict()}, {})


def _make_way(folder: Path, console: Console) -> None:
    """Move an earlier run out of the way instead of mixing with it or deleting it."""
    if not any((folder / name).exists() for name in ("metrics.jsonl", FOLDER)):
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    try:
        folder.rename(aside)
    except OSError as error:
        raise CheckpointError(f"{folder} holds an earlier run ({error.strerror}); choose another --out") from None
    console.print(f"{folder} held an earlier run, now in {aside}", soft_wrap=True, highlight=False)


def _save_after(error: TempoError, job: Job, store: CheckpointStore) -> None:
    """Save what there is and say so on ``error``; after NaN or infinity there is nothing worth saving."""
    if not isinstance(error, NonFiniteError):
        try:
            job.save_once(store)
        except TempoError as other:
            if str(other) != str(error):
                error.add_note(str(other))
    if steps := store.steps():
        error.add_note(f"Step {steps[-1]} is saved in {store.folder}; continue with --resume.")

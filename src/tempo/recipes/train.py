"""The main job: an ordinary training loop, whose model happens to compute its products on workers."""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, final

import msgspec
import numpy as np
import torch
from rich.console import Console
from torch.nn import functional as F

from tempo import checkpoint as checkpoints
from tempo.checkpoint import Checkpoint, CheckpointStore, flatten, load_model, unflatten
from tempo.errors import CheckpointError, NonFiniteError, SettingsError, TempoError, WeightsLostError
from tempo.initial import secret_initialisation
from tempo.recipes import data
from tempo.recipes import recipe as recipes
from tempo.recipes.inference import FOLDER, evaluate, format_of, protected, recipe_of
from tempo.recipes.metrics import Evaluation, Metrics, Step
from tempo.recipes.models import logits
from tempo.recipes.optimizers import scheduler
from tempo.recipes.progress import Display
from tempo.recipes.recipe import Recipe, differences

if TYPE_CHECKING:
    from tempo.session import Session
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
    job = _Job(recipe, source, earlier, initial, secret=recipe.session.base == "secret" and not plain)
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


def _loop(job: _Job, store: CheckpointStore, metrics: Metrics, display: Display, interrupts: _Interrupts) -> Outcome:
    job.generators.restore()
    job.moment = _Moment(job)
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
    job: _Job, began: float, store: CheckpointStore, metrics: Metrics, display: Display, interrupts: _Interrupts
) -> None:
    while job.step < job.steps and not interrupts.signal:
        job.moment = _Moment(job)
        record = _one_step(job, began)
        job.elapsed = record.time
        _report(job, record, metrics, display)
        if job.due(job.recipe.run.checkpoint_every):
            job.save(store)
        if job.due(job.recipe.run.evaluate_every):
            _evaluate(job, began, metrics, display, interrupts)


def _go_back(job: _Job, error: WeightsLostError, store: CheckpointStore, metrics: Metrics, display: Display) -> None:
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


def _report(job: _Job, record: Step, metrics: Metrics, display: Display) -> None:
    metrics.write(record)
    if job.session is not None and not job.placed:
        display.note(_placed(job.session.summary()))
        job.placed = True
    display.step(record)


def _evaluate(
    job: _Job, began: float, metrics: Metrics, display: Display, interrupts: _Interrupts
) -> Evaluation | None:
    """Evaluate on the test images, unless interrupted."""
    test, batch_size = job.source.test, job.recipe.data.batch_size
    loss, accuracy = evaluate(job.model, test, job.format, batch_size, lambda: interrupts.signal != 0)
    if interrupts.signal:
        return None
    evaluation = Evaluation(job.step, loss, accuracy, time.perf_counter() - began)
    metrics.write(evaluation)
    display.evaluation(evaluation)
    return evaluation


def _one_step(job: _Job, began: float) -> Step:
    recipe, session = job.recipe, job.session
    started = time.perf_counter()
    before = session.stats() if session is not None else None
    rate = float(job.scheduler.get_last_lr()[0])

    chosen = job.order.batch()
    labels = job.source.train.labels[chosen]
    images = job.format.numbers(job.source.train.images[chosen])
    images = data.augment(images, recipe.data.augment, job.order.randomness())

    job.model.train()
    scores = logits(job.model, images)
    loss = F.cross_entropy(scores, labels)
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the loss became {value} at step {job.step + 1}: lower optimizer.lr, add schedule.warmup or run.clip_norm"
        )
    job.optimizer.zero_grad()
    loss.backward()
    if recipe.run.clip_norm:
        clip = torch.nn.utils.clip_grad_norm_ if session is None else session.clip_grad_norm_
        clip(job.model.parameters(), recipe.run.clip_norm)
    job.optimizer.step()
    job.scheduler.step()
    job.order.advance()
    job.step += 1

    now = time.perf_counter()
    seconds, sent, received = {"trusted": now - started}, 0, 0
    if session is not None and before is not None:
        after = session.stats()
        away = {place: after.seconds[place] - before.seconds[place] for place in after.seconds}
        seconds = {**away, "trusted": max(0.0, now - started - sum(away.values()))}
        sent, received = after.bytes_sent - before.bytes_sent, after.bytes_received - before.bytes_received
    accuracy = float((scores.argmax(1) == labels).float().mean())
    return Step(job.step, value, accuracy, rate, now - began, seconds, sent, received)


@final
class _Job:
    """Everything that a checkpoint must hold for a run to continue exactly."""

    def __init__(
        self,
        recipe: Recipe,
        source: data.Source,
        earlier: Checkpoint | None,
        initial: Mapping[str, torch.Tensor] | None,
        *,
        secret: bool,
    ) -> None:
        self.recipe = recipe
        self.source = source
        self.format = source.format(recipe.data.resize) if earlier is None else format_of(earlier)
        self.steps = recipe.steps(len(source.train))
        self.step = 0
        self.elapsed = 0.0
        self._saved = -1
        _seed(recipe.run.seed)
        self.model = recipe.model.build(self.format.channels, self.format.size, len(self.format.classes))
        self.base = "public"
        """What the weights count as that this run started from, however often it was resumed."""
        if earlier is not None:
            self.base = earlier.state.get("base", "public")
        elif initial is not None:
            load_model(self.model, initial, "the initial state")
        elif secret:
            secret_initialisation(self.model)
            self.base = "secret"
        self.optimizer = recipe.optimizer.build(self.model)
        self.scheduler = scheduler(recipe.schedule, self.optimizer, self.steps)
        self.order = data.Order(len(source.train), recipe.data.batch_size, recipe.run.seed)
        if earlier is not None:
            self._restore(earlier)
        self.generators = _Generators()
        self.session: Session | None = None
        self.moment: _Moment
        self.back_at, self.turns = -1, 0
        """The step that was last gone back to, and how often."""
        self.placed = False
        """Whether the session has placed the layers: it does when the first batch comes."""

    def due(self, every: int) -> bool:
        """Whether what happens ``every`` so many steps is due; not at the last one, after which all of it happens."""
        return every > 0 and self.step % every == 0 and self.step < self.steps

    def save_once(self, store: CheckpointStore) -> None:
        """Save, unless this very step is saved already."""
        if self._saved != self.step:
            self.save(store)

    def save(self, store: CheckpointStore) -> None:
        parts = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generators": checkpoints.generators(),
            "order": self.order.state_dict(),
        }
        tensors: dict[str, dict[str, torch.Tensor]] = {"model": self.model.state_dict()}
        state: dict[str, Any] = {
            "recipe": msgspec.to_builtins(self.recipe),
            "format": msgspec.to_builtins(self.format),
            "elapsed": self.elapsed,
            "base": self.base,
            "trusted": None if self.session is None else _kept(self.session.summary()),
        }
        for name, part in parts.items():
            tensors[name], state[name] = flatten(part)
        store.save(self.step, {name: group for name, group in tensors.items() if group}, state)
        self._saved = self.step

    def go_back(self, earlier: Checkpoint) -> None:
        """To an earlier step of this very run, whose time goes on."""
        elapsed = self.elapsed
        if self.session is not None:
            self.session.abandon_lost_weights()
        self._restore(earlier)
        self.elapsed = elapsed

    def _restore(self, earlier: Checkpoint) -> None:
        def part(name: str) -> Any:
            return unflatten(earlier.tensors.get(name, {}), earlier.state[name])

        load_model(self.model, earlier.tensors["model"], str(earlier.path))
        try:
            self.optimizer.load_state_dict(part("optimizer"))
            self.scheduler.load_state_dict(part("scheduler"))
            self.order.load_state_dict(part("order"))
            checkpoints.restore_generators(part("generators"))
            self.step, self.elapsed = earlier.step, earlier.state["elapsed"]
            self._saved = earlier.step
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{earlier.path} does not fit this recipe: {error}") from None


@final
class _Generators:
    """The states of the random generators at one moment."""

    def __init__(self) -> None:
        self._state = checkpoints.generators()

    def restore(self) -> None:
        checkpoints.restore_generators(self._state)


@final
class _Moment:
    """What a step that fails half-way has already changed: generators, and buffers such as BatchNorm's averages."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._step = job.step
        self._generators = _Generators()
        self._buffers = [buffer.clone() for buffer in job.model.buffers()]

    def restore(self) -> None:
        if self._job.step > self._step:
            return  # the step was completed, what failed came after it
        self._generators.restore()
        with torch.no_grad():
            for buffer, earlier in zip(self._job.model.buffers(), self._buffers):
                buffer.copy_(earlier)


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


def _kept(summary: Summary) -> list[str] | None:
    """Layers that ran in the trusted process only; None while not every layer has had its one place."""
    if any(bool(line.trusted) == bool(line.offloaded) for line in summary.lines):
        return None
    return [line.name for line in summary.lines if line.trusted]


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


def _save_after(error: TempoError, job: _Job, store: CheckpointStore) -> None:
    """Save what there is and say so on ``error``; after NaN or infinity there is nothing worth saving."""
    if not isinstance(error, NonFiniteError):
        try:
            job.save_once(store)
        except TempoError as other:
            if str(other) != str(error):
                error.add_note(str(other))
    if steps := store.steps():
        error.add_note(f"Step {steps[-1]} is saved in {store.folder}; continue with --resume.")


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)

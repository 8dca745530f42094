"""What a training run consists of: its model, optimizer, order of images and generators, and one step of it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import msgspec
import numpy as np
import torch
from torch.nn import functional as F
from torch.profiler import record_function

from tempo import checkpoint as checkpoints
from tempo.checkpoint import Checkpoint, CheckpointStore, flatten, load_model, unflatten
from tempo.errors import CheckpointError, NonFiniteError
from tempo.initial import secret_initialisation
from tempo.recipes import data
from tempo.recipes.inference import format_of
from tempo.recipes.metrics import Step
from tempo.recipes.models import logits
from tempo.recipes.optimizers import scheduler
from tempo.recipes.recipe import Recipe
from tempo.recipes.running import Stopwatch

if TYPE_CHECKING:
    from tempo.session import Session
    from tempo.summary import Summary


@final
class Job:
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
        seed_all(recipe.run.seed)
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
        self.moment: Moment
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
        """Save all of it."""
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
class Moment:
    """What a step that fails half-way has already changed: generators, and buffers such as BatchNorm's averages."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._step = job.step
        self._generators = _Generators()
        self._buffers = [buffer.clone() for buffer in job.model.buffers()]

    def restore(self) -> None:
        """Take back what a step that failed has changed."""
        if self._job.step > self._step:
            return  # the step was completed, what failed came after it
        self._generators.restore()
        with torch.no_grad():
            for buffer, earlier in zip(self._job.model.buffers(), self._buffers):
                buffer.copy_(earlier)


def one_step(job: Job, began: float) -> Step:
    """Take one step.

    Args:
        job: The run.
        began: When it did, by `time.perf_counter`.

    Raises:
        NonFiniteError: The loss is NaN or infinite; nothing was changed but generators and buffers.
    """
    recipe, session = job.recipe, job.session
    watch = Stopwatch(session)
    rate = float(job.scheduler.get_last_lr()[0])

    with record_function("data"):
        chosen = job.order.batch()
        labels = job.source.train.labels[chosen]
        images = job.format.numbers(job.source.train.images[chosen])
        images = data.augment(images, recipe.data.augment, job.order.randomness())

    job.model.train()
    with record_function("forward"):
        scores = logits(job.model, images)
    with record_function("loss"):
        loss = F.cross_entropy(scores, labels)
        value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the loss became {value} at step {job.step + 1}: lower optimizer.lr, add schedule.warmup or run.clip_norm"
        )
    job.optimizer.zero_grad()
    with record_function("backward"):
        loss.backward()
    if recipe.run.clip_norm:
        with record_function("clip"):
            clip = torch.nn.utils.clip_grad_norm_ if session is None else session.clip_grad_norm_
            clip(job.model.parameters(), recipe.run.clip_norm)
    with record_function("optimizer"):
        job.optimizer.step()
        job.scheduler.step()
    job.order.advance()
    job.step += 1

    seconds, sent, received = watch.split()
    accuracy = float((scores.argmax(1) == labels).float().mean())
    return Step(job.step, value, accuracy, rate, time.perf_counter() - began, seconds, sent, received)


def _kept(summary: Summary) -> list[str] | None:
    """Layers that ran in the trusted process only; None while not every layer has had its one place."""
    if any(bool(line.trusted) == bool(line.offloaded) for line in summary.lines):
        return None
    return [line.name for line in summary.lines if line.trusted]


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, none of which makes keys."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)

"""What a fine-tuning run consists of, one step of it, and how it is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempo import checkpoint as checkpoints
from tempo.checkpoint import Checkpoint, CheckpointStore, flatten, unflatten
from tempo.errors import CheckpointError, NonFiniteError
from tempo.recipes import data
from tempo.recipes.finetune import base
from tempo.recipes.finetune.examples import IGNORED, Example, batch, prepare
from tempo.recipes.finetune.records import digest, read
from tempo.recipes.finetune.tuning import Tuning
from tempo.recipes.job import seed_all
from tempo.recipes.metrics import Step
from tempo.recipes.optimizers import scheduler
from tempo.recipes.running import Stopwatch

if TYPE_CHECKING:
    from tempo.session import Session


@final
class Job:
    """Everything that a checkpoint must hold for a run to continue exactly. The base is not in it, only the adapter.

    Args:
        tuning: What to do.
        earlier: The checkpoint to continue from, if any.
    """

    def __init__(self, tuning: Tuning, earlier: Checkpoint | None) -> None:
        self.tuning = tuning
        self.tokenizer = base.load_tokenizer(tuning.model.base)
        self.seed = tuning.run.seed
        seed_all(self.seed)
        self.model: nn.Module = base.load_model(tuning.model)
        self.most = base.most_tokens(self.model)
        """Tokens that the base can read at once."""
        file = Path(tuning.data.file)
        self.digest = digest(file)
        self.examples = prepare(
            read(file),
            self.tokenizer,
            length=min(tuning.data.length, self.most),
            validation=tuning.data.validation,
            seed=self.seed,
        )
        self.batch_size = min(tuning.data.batch_size, len(self.examples.train))
        self.epoch = len(self.examples.train) // self.batch_size
        self.steps = tuning.run.steps or tuning.run.epochs * self.epoch
        self.optimizer = tuning.optimizer.build(self.model)
        self.scheduler = scheduler(tuning.schedule, self.optimizer, self.steps)
        self.order = data.Order(len(self.examples.train), self.batch_size, self.seed)
        self.session: Session | None = None
        self.step = 0
        self.saved = self.evaluated = -1
        self.elapsed = 0.0
        self.best: dict[str, Tensor] = {}
        """The adapter at its lowest loss so far on what was kept apart."""
        self.best_loss, self.best_step = math.inf, 0
        self.worse = 0
        """Evaluations in a row that brought no lower loss."""
        if earlier is not None:
            self._restore(earlier)
        self.generators = checkpoints.generators()

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or more would not help."""
        return self.step >= self.steps or 0 < self.tuning.run.stop_after <= self.worse

    @property
    def evaluation_due(self) -> bool:
        """Whether the adapter should be measured before the next step; before the first, it is the base that is."""
        every = self.tuning.run.evaluate_every or self.epoch
        at = self.step % every == 0 or self.step == self.steps
        return at and self.evaluated != self.step and bool(self.examples.validation)

    @property
    def checkpoint_due(self) -> bool:
        """Whether the step that was just done should be saved."""
        every = self.tuning.run.checkpoint_every
        return self.step == self.steps or (every > 0 and self.step % every == 0)

    def rows(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch of ``examples``."""
        return batch(examples, self.tuning.data.pad_to, self.most)

    def adapter(self) -> dict[str, Tensor]:
        """What trains, by name."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def noted(self, loss: float) -> None:
        """Take note of the loss on what was kept apart."""
        self.evaluated = self.step
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.worse = loss, self.step, 0
            self.best = {name: tensor.clone() for name, tensor in self.adapter().items()}
        else:
            self.worse += 1

    def take_best(self) -> None:
        """Go back to the adapter that was best; without evaluations it is the last."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.best:
                    parameter.copy_(self.best[name])

    def save(self, store: CheckpointStore) -> None:
        """Save all of it, unless this very step is saved already."""
        if self.saved == self.step:
            return
        parts = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generators": checkpoints.generators(),
            "order": self.order.state_dict(),
            "progress": {name: getattr(self, name) for name in _PROGRESS},
        }
        tensors = {"adapter": self.adapter(), "best": self.best}
        state: dict[str, Any] = {"tuning": msgspec.to_builtins(self.tuning), "data": self.digest}
        for name, part in parts.items():
            tensors[name], state[name] = flatten(part)
        store.save(self.step, {name: group for name, group in tensors.items() if group}, state)
        self.saved = self.step

    def _restore(self, earlier: Checkpoint) -> None:
        def part(name: str) -> Any:
            return unflatten(earlier.tensors.get(name, {}), earlier.state[name])

        own, stored = self.adapter(), earlier.tensors.get("adapter", {})
        if {name: p.shape for name, p in own.items()} != {name: p.shape for name, p in stored.items()}:
            raise CheckpointError(f"{earlier.path} holds an adapter for another base")
        try:
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(stored[name])
            self.optimizer.load_state_dict(part("optimizer"))
            self.scheduler.load_state_dict(part("scheduler"))
            self.order.load_state_dict(part("order"))
            checkpoints.restore_generators(part("generators"))
            for name in _PROGRESS:
                setattr(self, name, part("progress")[name])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{earlier.path} does not fit this run: {error}") from None
        self.best = earlier.tensors.get("best", {})
        self.saved = self.step


_PROGRESS = ("step", "elapsed", "evaluated", "best_loss", "best_step", "worse")


def score(model: nn.Module, rows: dict[str, Tensor]) -> tuple[Tensor, int, int]:
    """Sum of the losses over tokens that are learned, how many are foretold right, and how many there are."""
    read = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"], "use_cache": False}
    logits = model(**read).logits[:, :-1]
    labels = rows["labels"][:, 1:]
    learned = labels != IGNORED
    logits, labels = logits[learned].float(), labels[learned]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return loss, int((logits.argmax(-1) == labels).sum()), len(labels)


def one_step(job: Job, began: float) -> Step:
    """Take one step.

    Args:
        job: The run.
        began: When it did, by `time.perf_counter`.

    Raises:
        NonFiniteError: The loss is NaN or infinite; nothing was changed but generators and gradients.
    """
    watch = Stopwatch(job.session)
    rate = float(job.scheduler.get_last_lr()[0])
    chosen = [job.examples.train[number] for number in job.order.batch().tolist()]
    job.model.train()
    count = sum(example.learned for example in chosen)
    value, right = 0.0, 0
    job.optimizer.zero_grad()
    for part in _parts(chosen, job.tuning.data.accumulation):
        loss, more, _ = score(job.model, job.rows(part))
        loss = loss / count
        value, right = value + loss.item(), right + more
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss became {value} at step {job.step + 1}: lower --lr")
        loss.backward()
    if job.tuning.run.clip_norm:
        torch.nn.utils.clip_grad_norm_(job.model.parameters(), job.tuning.run.clip_norm)
    job.optimizer.step()
    job.scheduler.step()
    job.order.advance()
    job.step += 1
    seconds, sent, received = watch.split()
    return Step(job.step, value, right / count, rate, time.perf_counter() - began, seconds, sent, received)


def _parts(chosen: Sequence[Example], count: int) -> list[Sequence[Example]]:
    """At most ``count`` of nearly one size, none of them empty."""
    size = -(-len(chosen) // count)
    return [chosen[start : start + size] for start in range(0, len(chosen), size)]


def evaluate(job: Job, stop: Callable[[], bool]) -> tuple[float, float]:
    """Mean loss and accuracy per token on what was kept apart; breaks off when ``stop`` says so."""
    examples = job.examples.validation
    job.model.eval()
    loss, right, count = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(examples), job.batch_size):
            rows = job.rows(examples[start : start + job.batch_size])
            more, correct, tokens = score(job.model, rows)
            loss, right, count = loss + more.item(), right + correct, count + tokens
            if stop():
                break
    return loss / count, right / count

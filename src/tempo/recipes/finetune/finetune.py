"""Fine-tuning from its first step, or from a checkpoint, to the adapter in PEFT's own format."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from tempo import checkpoint as checkpoints
from tempo.checkpoint import Checkpoint, CheckpointStore
from tempo.errors import CheckpointError, TempoError
from tempo.recipes import table
from tempo.recipes.finetune.job import Job, evaluate, one_step
from tempo.recipes.finetune.records import digest
from tempo.recipes.finetune.sampling import sample
from tempo.recipes.finetune.tuning import Tuning, differences
from tempo.recipes.inference import FOLDER, protected
from tempo.recipes.metrics import Evaluation, Metrics, Step
from tempo.recipes.progress import Display
from tempo.recipes.running import Interrupts, Outcome, continued, make_way, placed, save_after


def finetune(tuning: Tuning, console: Console, *, resume: bool = False, plain: bool = False) -> Outcome:
    """Tune an adapter by ``tuning``.

    Args:
        tuning: What to do.
        console: Where to show progress.
        resume: Continue from the newest checkpoint in the run's folder.
        plain: Compute everything here, without a session.

    Returns:
        How it ended, and the loss of the adapter that was stored on what was kept apart.

    Raises:
        TempoError: Something went wrong; if training had begun, a checkpoint was saved, as a note on the error says.
    """
    folder = Path(tuning.run.out)
    store = CheckpointStore(folder / FOLDER)
    earlier = None
    if resume:
        earlier = continued(store, console, lambda found: _differences(tuning, found))
    job = Job(tuning, earlier)
    for note in job.examples.notes:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    with protected(job.model, tuning.session, plain) as session:
        if earlier is None:
            make_way(folder, console)
        job.session = session
        display = Display(console, "fine-tuning", job.step, job.steps, job.batch_size, "validation")
        evaluated = job.evaluated == job.step
        with Metrics(folder, job.step, evaluated=evaluated) as metrics, display, Interrupts() as interrupts:
            return _loop(job, store, metrics, display, interrupts)


def _loop(job: Job, store: CheckpointStore, metrics: Metrics, display: Display, interrupts: Interrupts) -> Outcome:
    folder = Path(job.tuning.run.out)
    checkpoints.restore_generators(job.generators)
    began = time.perf_counter() - job.elapsed
    shown = job.session is None
    try:
        while not interrupts.signal:
            if job.evaluation_due:
                _evaluate(job, began, metrics, display, interrupts)
                continue
            if job.finished:
                job.take_best()
                _store(job, folder)
                display.note(_told(job))
                return Outcome(folder, job.best_step or job.step, 0, job.best_loss)
            record = _step(job, began)
            job.elapsed = record.time
            metrics.write(record)
            if job.session is not None and not shown:
                display.note(placed(job.session.summary()))
                shown = True
            display.step(record)
            if job.checkpoint_due:
                job.save(store)
        job.save(store)
    except TempoError as error:
        save_after(error, lambda: job.save(store), store)
        raise
    return Outcome(folder, job.step, interrupts.signal)


def _step(job: Job, began: float) -> Step:
    """One step; one that fails half-way leaves the generators as they were, so that it can be taken again."""
    state = checkpoints.generators()
    try:
        return one_step(job, began)
    except TempoError:
        checkpoints.restore_generators(state)
        raise


def _evaluate(job: Job, began: float, metrics: Metrics, display: Display, interrupts: Interrupts) -> None:
    """Measure the adapter, unless interrupted, and show what it writes."""
    loss, accuracy = evaluate(job, lambda: interrupts.signal != 0)
    if interrupts.signal:
        return
    job.noted(loss)
    evaluation = Evaluation(job.step, loss, accuracy, time.perf_counter() - began)
    metrics.write(evaluation)
    display.evaluation(evaluation)
    if job.tuning.run.sample_tokens:
        display.note(f"sample: {sample(job)}")
    if job.finished and job.step < job.steps:
        display.note(f"stopping: no lower loss than {job.best_loss:.4f} at step {job.best_step}")


def _store(job: Job, folder: Path) -> None:
    """The adapter in PEFT's own format, and what the session did."""
    model: Any = job.model
    try:
        model.save_pretrained(folder)
        if job.session is not None:
            (folder / "summary.txt").write_text(f"{job.session.summary()}\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write the adapter: {error.strerror or error}") from None


def _told(job: Job) -> str:
    """What was stored, and how to use it."""
    model = job.tuning.model
    kept = f"the adapter of step {job.best_step}, of loss {job.best_loss:.4f}" if job.best else "the last adapter"
    return f"stored {kept}; load it with PeftModel.from_pretrained(base, {job.tuning.run.out!r}), base {model.base!r}"


def _differences(tuning: Tuning, found: Checkpoint) -> list[str]:
    """What keeps the run from continuing ``found`` exactly."""
    lines = differences(tuning, table.convert(found.state.get("tuning", {}), Tuning, str(found.path)))
    if not lines and found.state.get("data") != digest(Path(tuning.data.file)):
        lines.append(f"data.file: {tuning.data.file} holds something else now")
    return lines

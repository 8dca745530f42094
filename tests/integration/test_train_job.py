"""The main job in plain: what holds for the loop, its checkpoints and its records, whoever computes the products."""

from __future__ import annotations

import io
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tempo import checkpoint
from tempo.checkpoint import CheckpointStore
from tempo.errors import CheckpointError, NonFiniteError, SettingsError, WorkerLostError
from tempo.recipes import inference, metrics, models
from tempo.recipes import job as jobs
from tempo.recipes import recipe as recipes
from tempo.recipes import train as training
from tempo.recipes.comparison import losses
from tempo.recipes.metrics import Evaluation, Step
from tempo.recipes.recipe import Recipe
from tempo.recipes.running import Outcome

# Everything that a resume could get wrong: dropout, augmentation, momentum, a schedule, more than one epoch.
MLP = {
    "model": {"name": "mlp", "width": 16, "dropout": 0.2},
    "data": {"train_limit": 70, "test_limit": 40, "batch_size": 16, "augment": ["crop", "flip"]},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "schedule": {"name": "cosine", "warmup": 3},
    "run": {"steps": 12, "checkpoint_every": 6, "seed": 5},
}
RESNET = {
    "model": {"name": "resnet-small", "width": 4, "depths": [1, 1]},
    "data": {"train_limit": 70, "test_limit": 40, "batch_size": 16, "resize": 16},
    "optimizer": {"name": "sgd", "lr": 0.05},
    "run": {"steps": 8, "clip_norm": 0.5},
}


def recipe(folder: Path, base: dict[str, Any] = MLP, **tables: dict[str, Any]) -> Recipe:
    values = {name: {**base.get(name, {}), **tables.get(name, {})} for name in {*base, *tables}}
    values["run"]["out"] = str(folder)
    return recipes.parse(values, "test")


def train(job: Recipe, *, resume: bool = False) -> tuple[Outcome, str]:
    out = io.StringIO()
    outcome = training.train(job, Console(file=out, width=200), resume=resume, plain=True)
    return outcome, out.getvalue()


def test_a_run_records_every_step_and_ends_with_a_checkpoint(tmp_path: Path) -> None:
    outcome, text = train(recipe(tmp_path, run={"evaluate_every": 5}))
    assert outcome.step == 12
    records = metrics.read(tmp_path)
    steps = [record for record in records if isinstance(record, Step)]
    assert [record.step for record in steps] == list(range(1, 13))
    assert [record.step for record in records if isinstance(record, Evaluation)] == [5, 10, 12]
    assert [step.time for step in steps] == sorted(step.time for step in steps)
    assert all(step.seconds["trusted"] > 0 for step in steps)
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [6, 12]
    assert list((tmp_path / "tensorboard").iterdir())
    assert "step 12/12" in text
    assert f"loss {outcome.loss:.4f}" in text
    # The numbers on disk are the numbers, not roundings of them.
    assert all(torch.tensor(step.loss, dtype=torch.float32).item() == step.loss for step in steps)


def test_training_learns(tmp_path: Path) -> None:
    tables = {"model": {"dropout": 0.0, "width": 64}, "data": {"train_limit": 0, "augment": []}, "run": {"steps": 80}}
    outcome, _ = train(recipe(tmp_path, **tables))
    assert outcome.accuracy > 0.8


@pytest.mark.parametrize("base", [MLP, RESNET], ids=["mlp", "resnet"])
def test_a_resumed_run_has_the_same_losses_bit_for_bit(tmp_path: Path, base: dict[str, Any]) -> None:
    job = recipe(tmp_path, base, run={"checkpoint_every": 4})
    whole, _ = train(job)
    straight = losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / f"step-{whole.step:08d}")
    again, text = train(job, resume=True)
    assert "continuing from" in text
    assert losses(tmp_path) == straight
    assert (again.loss, again.accuracy) == (whole.loss, whole.accuracy)
    assert len([record for record in metrics.read(tmp_path) if isinstance(record, Evaluation)]) == 1


def test_an_interrupted_run_finishes_its_step_saves_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe(tmp_path / "straight"))

    def logits(model: nn.Module, images: Tensor, count: list[int] = []) -> Tensor:  # noqa: B006
        count.append(1)
        if len(count) == 5:
            signal.raise_signal(signal.SIGINT)
        return models.logits(model, images)

    job = recipe(tmp_path / "interrupted")
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "logits", logits)
        outcome, _ = train(job)
    assert (outcome.signal, outcome.step) == (signal.SIGINT, 5)
    assert CheckpointStore(tmp_path / "interrupted/checkpoints").steps() == [5]
    outcome, _ = train(job, resume=True)
    assert (outcome.signal, outcome.step) == (0, 12)
    assert losses(tmp_path / "interrupted") == losses(tmp_path / "straight")


@pytest.mark.parametrize("base", [MLP, RESNET], ids=["mlp", "resnet"])
def test_a_lost_worker_in_the_middle_of_a_step_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: dict[str, Any]
) -> None:
    train(recipe(tmp_path / "straight", base))

    def logits(model: nn.Module, images: Tensor, count: list[int] = []) -> Tensor:  # noqa: B006
        scores = models.logits(model, images)  # moves generators and BatchNorm's averages
        count.append(1)
        if len(count) == 4:
            raise WorkerLostError("worker gpu-a:7070 is gone")
        return scores

    job = recipe(tmp_path / "broken", base)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "logits", logits)
        with pytest.raises(WorkerLostError, match="gpu-a") as caught:
            train(job)
    assert "Step 3 is saved" in "".join(caught.value.__notes__)
    train(job, resume=True)
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


def test_a_diverged_run_stops_and_saves_nothing_broken(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"loss became .* lower optimizer\.lr"):
        train(recipe(tmp_path, optimizer={"name": "sgd", "lr": 1e30, "momentum": 0.0}, run={"checkpoint_every": 0}))
    assert CheckpointStore(tmp_path / "checkpoints").steps() == []


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint._write

    def full(path: Path, content: bytes, count: list[int] = []) -> Any:  # noqa: B006
        count.append(1)
        if len(count) > 5:
            raise OSError(28, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        with pytest.raises(CheckpointError, match=r"step 12.*No space left on device.*step 6 is intact"):
            train(recipe(tmp_path))
    outcome, _ = train(recipe(tmp_path), resume=True)
    assert outcome.step == 12


def test_a_new_run_moves_an_earlier_one_aside(tmp_path: Path) -> None:
    job = recipe(tmp_path / "run", run={"steps": 2})
    train(job)
    first = losses(tmp_path / "run")
    _, text = train(job)
    assert "now in" in text
    assert losses(tmp_path / "run.1") == first
    assert losses(tmp_path / "run") == first


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_word(tmp_path: Path) -> None:
    train(recipe(tmp_path))
    straight = losses(tmp_path)
    (tmp_path / "checkpoints/step-00000012/model.safetensors").write_bytes(b"")
    _, text = train(recipe(tmp_path), resume=True)
    assert "passed over" in text
    assert losses(tmp_path) == straight
    assert CheckpointStore(tmp_path / "checkpoints").load().damaged == []


def test_resuming_what_is_not_there_or_not_the_same_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(recipe(tmp_path), resume=True)
    train(recipe(tmp_path))
    with pytest.raises(SettingsError, match=r"optimizer\.lr: now 0\.5, in the checkpoint 0\.01"):
        train(recipe(tmp_path, optimizer={"lr": 0.5}), resume=True)
    with pytest.raises(SettingsError, match=r"model\.width: now 17"):
        train(recipe(tmp_path, model={"width": 17}), resume=True)


def test_a_finished_model_evaluates_the_same_from_its_checkpoint(tmp_path: Path) -> None:
    outcome, _ = train(recipe(tmp_path))
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/step-00000012"):
        trained = inference.load(path)
        test = training.data.load("digits", 70, 40).test
        assert inference.evaluate(trained.model, test, trained.format, 16) == (outcome.loss, outcome.accuracy)
    with pytest.raises(CheckpointError, match=r"of another model: '1\.weight' is \(16, 64\) there, \(8, 64\) here"):
        inference.load(tmp_path, ["model.width=8"])
    with pytest.raises(CheckpointError, match="does not exist"):
        inference.load(tmp_path / "nowhere")

"""The trusted process killed at random moments: its run resumes from a whole checkpoint, and the losses go on."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tempo.checkpoint import CheckpointStore
from tempo.recipes import recipe as recipes
from tempo.recipes import train as training
from tempo.recipes.comparison import losses

KILLS = int(os.environ.get("TEMPO_CHAOS_KILLS", "4"))
STEPS = 24


def job(folder: Path, workers: list[str]) -> recipes.Recipe:
    values: dict[str, Any] = {
        "model": {"name": "vit-small", "width": 16, "depth": 1, "heads": 2, "mlp": 24},
        "data": {"source": "digits", "train_limit": 70, "test_limit": 20, "batch_size": 16},
        "run": {"steps": STEPS, "checkpoint_every": 2, "out": str(folder)},
        "session": {"placement": "all", "scheme": "insecure-plain", "workers": workers, "divide_flops": 1},
    }
    return recipes.parse(values, "test")


def run(folder: Path, workers: list[str]) -> None:
    """The whole life of a trusted process."""
    begun = bool(CheckpointStore(folder / training.FOLDER).steps())
    with Path(os.devnull).open("w") as nowhere:
        training.train(job(folder, workers), Console(file=nowhere), resume=begun)


def test_a_run_killed_again_and_again_ends_as_if_it_never_was(tmp_path: Path, workers: list[str]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tempo.recipes.train", "tempo.session"])
    chance = random.Random(0)

    def start(folder: Path, patience: float | None) -> int | None:
        process = context.Process(target=run, args=(folder, workers[:2]))
        process.start()
        process.join(patience)
        process.kill()
        process.join()
        code = process.exitcode
        process.close()
        return code

    assert start(tmp_path / "undisturbed", None) == 0
    expected = losses(tmp_path / "undisturbed")
    assert len(expected) == STEPS
    killed, number = 0, 0
    while killed < KILLS:
        folder = tmp_path / f"disturbed{number}"
        number += 1
        while (code := start(folder, chance.uniform(0.3, 3.0)) if killed < KILLS else start(folder, None)) != 0:
            assert code == -9, "it ended by an error of its own"
            killed += 1
        assert losses(folder) == pytest.approx(expected, rel=1e-6)
    assert killed == KILLS

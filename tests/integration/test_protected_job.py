"""The main job through real workers: same numbers, exact resumes, placement, and the picture at the end."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from tempo.checkpoint import CheckpointStore
from tempo.engine import local
from tempo.errors import WorkerError
from tempo.recipes import inference, metrics, models
from tempo.recipes import job as jobs
from tempo.recipes import recipe as recipes
from tempo.recipes import train as training
from tempo.recipes.comparison import compare, losses
from tempo.recipes.metrics import Step
from tempo.recipes.recipe import Recipe
from tempo.recipes.running import Outcome

VIT = {
    "model": {"name": "vit-small", "width": 16, "depth": 1, "heads": 2, "mlp": 24, "dropout": 0.1},
    "data": {"train_limit": 70, "test_limit": 20, "batch_size": 16, "augment": ["crop"]},
    "schedule": {"name": "cosine"},
    "run": {"steps": 8, "checkpoint_every": 4},
    "session": {"placement": "all", "trusted": ["*patch_embeddings*"], "scheme": "tempo"},
}
MIX = {
    "model": {"name": "vit-small", "width": 32, "depth": 1, "heads": 2, "mlp": 32},
    "session": {"scheme": "mix", "base": "secret"},
}


def recipe(folder: Path, **tables: dict[str, Any]) -> Recipe:
    values = {name: {**VIT.get(name, {}), **tables.get(name, {})} for name in {*VIT, *tables}}
    values["run"]["out"] = str(folder)
    return recipes.parse(values, "test")


def train(job: Recipe, **options: Any) -> tuple[Outcome, str]:
    out = io.StringIO()
    outcome = training.train(job, Console(file=out, width=200), **options)
    return outcome, out.getvalue()


@pytest.mark.parametrize("scheme", ["tempo", "insecure-plain"])
def test_protected_training_has_the_losses_of_plain_training(tmp_path: Path, workers: list[str], scheme: str) -> None:
    session = {"scheme": scheme, "workers": workers[:2], "divide_flops": 1}
    protected, text = train(recipe(tmp_path / "protected", session=session))
    plain, _ = train(recipe(tmp_path / "plain", session=session), plain=True)
    expected = torch.tensor(losses(tmp_path / "plain"))
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "protected")), expected, rtol=1e-4, atol=1e-6)
    assert protected.accuracy == plain.accuracy

    assert f"scheme {scheme}" in text
    assert "7 of 8 layers" in text
    assert "patch_embeddings" in (tmp_path / "protected/summary.txt").read_text()
    steps = [record for record in metrics.read(tmp_path / "protected") if isinstance(record, Step)]
    assert all(step.bytes_sent > 0 and step.bytes_received > 0 for step in steps)
    assert all(set(step.seconds) == {"mask", "verify", "wire", "worker", "plan", "trusted"} for step in steps)


@pytest.mark.parametrize("scheme", ["tempo", "insecure-plain"])
def test_a_resumed_run_continues_bit_for_bit_or_within_rounding(
    tmp_path: Path, workers: list[str], scheme: str
) -> None:
    job = recipe(tmp_path, session={"scheme": scheme, "workers": workers[:1]})
    train(job)
    straight = losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/step-00000008")
    train(job, resume=True)
    if scheme == "insecure-plain":
        assert losses(tmp_path) == straight
    else:
        assert losses(tmp_path)[:4] == straight[:4]
        torch.testing.assert_close(torch.tensor(losses(tmp_path)), torch.tensor(straight), rtol=1e-4, atol=1e-6)


def test_a_resumed_run_places_layers_as_before(tmp_path: Path, workers: list[str]) -> None:
    session = {"scheme": "insecure-plain", "workers": workers[:1], "trusted": ["*fc1"]}
    _, before = train(recipe(tmp_path, session=session))
    shutil.rmtree(tmp_path / "checkpoints/step-00000008")
    # By itself, `auto` would keep all of these small layers trusted.
    _, after = train(recipe(tmp_path, session={**session, "trusted": [], "placement": "auto"}), resume=True)
    assert "7 of 8 layers" in before
    assert "7 of 8 layers" in after
    (line,) = [
        line for line in (tmp_path / "summary.txt").read_text().splitlines() if "fc1" in line and "Linear" in line
    ]
    assert "trusted" in line


def test_a_killed_worker_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = recipe(tmp_path, session={"scheme": "insecure-plain", "local_threads": 1, "patience": 0})
    train(recipe(tmp_path / "plain"), plain=True)
    started: list[subprocess.Popen[bytes]] = []
    spawn = local._spawn

    def spawn_and_note(*arguments: Any) -> Any:
        process, sock = spawn(*arguments)
        started.append(process)
        return process, sock

    def logits(model: nn.Module, images: Tensor, count: list[int] = []) -> Tensor:  # noqa: B006
        count.append(1)
        if len(count) == 3:
            started[0].kill()
            started[0].wait()
        return models.logits(model, images)

    with monkeypatch.context() as patch:
        patch.setattr(local, "_spawn", spawn_and_note)
        patch.setattr(jobs, "logits", logits)
        with pytest.raises(WorkerError) as caught:
            train(job)
    assert "Step 2 is saved" in "".join(caught.value.__notes__)
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [2]
    train(job, resume=True, plain=True)
    assert losses(tmp_path)[2:] == pytest.approx(losses(tmp_path / "plain")[2:], rel=1e-4)


def test_no_key_reaches_a_checkpoint(tmp_path: Path, workers: list[str]) -> None:
    train(recipe(tmp_path, session={"workers": workers[:1]}))
    found = CheckpointStore(tmp_path / "checkpoints").load()
    assert set(found.tensors) == {"model", "optimizer", "generators"}
    assert set(found.state) == {
        "recipe", "format", "elapsed", "base", "trusted", "optimizer", "scheduler", "generators", "order",
    }  # fmt: skip


def test_the_comparison_ends_with_a_picture(tmp_path: Path, workers: list[str]) -> None:
    job = recipe(tmp_path, session={"workers": workers[:1]}, run={"compare_plain": True, "evaluate_every": 3})
    outcome, _ = train(job)
    out = io.StringIO()
    compare(job, Console(file=out, width=200), outcome)
    text = out.getvalue()
    assert "largest difference of a step's loss to plain training:" in text
    assert f"picture: {tmp_path}/report.png" in text
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path), rel=1e-4)
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.size[0] > 1000


def test_evaluation_through_workers_equals_plain(tmp_path: Path, workers: list[str]) -> None:
    outcome, _ = train(recipe(tmp_path), plain=True)
    overrides = [f'session.workers=["{workers[0]}"]', "session.placement=all", "session.scheme=tempo"]
    trained = inference.load(tmp_path, overrides)
    test = training.data.load("digits", 70, 20).test
    with inference.protected(trained.model, trained.recipe.session) as session:
        loss, accuracy = inference.evaluate(trained.model, test, trained.format, 16)
        assert session is not None
        assert session.stats().flops_offloaded > 0
    assert loss == pytest.approx(outcome.loss, rel=1e-5)
    assert accuracy == outcome.accuracy


def weights(folder: Path) -> dict[str, Tensor]:
    return CheckpointStore(folder).load().tensors["model"]


def test_a_secret_base_is_no_function_of_the_seed_and_the_comparison_starts_from_it(
    tmp_path: Path, workers: list[str]
) -> None:
    job = recipe(
        tmp_path / "job",
        model=MIX["model"],
        session={**MIX["session"], "workers": workers[:1]},
        run={"compare_plain": True, "steps": 4},
    )
    outcome, text = train(job)
    assert "scheme mix, base secret (base='secret' was given)" in text
    initial = weights(tmp_path / "job/initial")
    torch.manual_seed(job.run.seed)
    guessed = job.model.build(1, 8, 10).state_dict()
    name = "vit.encoder.layer.0.intermediate.dense.weight"
    name = name if name in guessed else next(n for n in guessed if guessed[n].shape == (32, 32))
    assert torch.equal(guessed[name].flatten().sort().values, initial[name].flatten().sort().values)
    assert (guessed[name] == initial[name]).sum() < 12
    out = io.StringIO()
    compare(job, Console(file=out, width=200), outcome)
    assert losses(tmp_path / "job/plain") == pytest.approx(losses(tmp_path / "job"), rel=1e-4)
    assert inference.load(tmp_path / "job").checkpoint.state["base"] == "secret"


def test_a_resumed_run_keeps_the_preset_it_began_with(tmp_path: Path, workers: list[str]) -> None:
    secret = {**MIX["session"], "workers": workers[:1]}
    job = recipe(tmp_path / "job", model=MIX["model"], session=secret)
    train(job)
    straight = losses(tmp_path / "job")
    shutil.rmtree(tmp_path / "job/checkpoints/step-00000008")
    _, text = train(recipe(tmp_path / "job", model=MIX["model"], session={**secret, "base": "auto"}), resume=True)
    assert "scheme mix, base secret" in text
    assert losses(tmp_path / "job") == pytest.approx(straight, rel=1e-4)

    # Weights that a seed gave do not become secret later.
    train(recipe(tmp_path / "seeded", model=MIX["model"], session=secret), plain=True)
    shutil.rmtree(tmp_path / "seeded/checkpoints/step-00000008")
    _, text = train(recipe(tmp_path / "seeded", model=MIX["model"], session=secret), resume=True)
    assert "scheme mix-tuned, base public" in text


@pytest.mark.parametrize("base", ["auto", "public"])
def test_a_recipe_whose_weights_depend_on_the_seed_has_a_public_base(
    tmp_path: Path, workers: list[str], base: str
) -> None:
    session = {"scheme": "mix", "base": base, "workers": workers[:1]}
    job = recipe(tmp_path, model=MIX["model"], session=session, run={"steps": 1})
    assert "scheme mix-tuned, base public" in train(job)[1]
    assert not (tmp_path / "initial").exists()

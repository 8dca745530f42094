from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import tempo
from tempo.cli import COMMANDS, app
from tempo.recipes.comparison import losses

RECIPE = """
[model]
name = "mlp"
width = 16

[data]
train_limit = 200
test_limit = 40

[run]
steps = {steps}
seed = 1
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "job.toml"
    file.write_text(RECIPE.format(steps=4))
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "job.toml").write_text(RECIPE.format(steps=40))
    changes = ("--set", "data.train_limit=0", "--set", "optimizer.name=adamw", "--set", "optimizer.lr=0.02")
    result = run("train", folder / "job.toml", "--plain", "--out", folder / "out", *changes)
    assert result.exit_code == 0, result.output
    return folder / "out"


def test_help_lists_every_command_without_importing_it() -> None:
    script = (
        "import sys\n"
        "from tempo.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted(n for n in sys.modules if n.startswith('tempo') or n == 'torch'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert all(name in done.stdout for name in COMMANDS)
    assert "['tempo', 'tempo.cli', 'tempo.errors']" in done.stdout


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"tempo {tempo.__version__}\n"


def test_an_unknown_command_names_the_nearest() -> None:
    result = run("trian")
    assert result.exit_code == 2
    assert "Did you mean 'train'" in result.output


def test_errors_are_one_message_without_a_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEMPO_DEBUG", raising=False)
    result = run("train", recipe, "--plain", "--set", "optimizer.name=adamw", "--set", "optimizer.lrr=1")
    assert result.exit_code == 1
    assert result.stderr == f"error: {recipe}: [optimizer]: unknown key 'lrr'; did you mean 'lr'?\n"
    assert "Traceback" not in result.output
    monkeypatch.setenv("TEMPO_DEBUG", "1")
    assert isinstance(run("train", recipe, "--plain", "--set", "x").exception, tempo.errors.TempoError)


def test_flags_win_over_the_recipe(recipe: Path, tmp_path: Path) -> None:
    result = run("train", recipe, "--plain", "--steps", "2", "--out", tmp_path / "out", "--set", "run.seed=9")
    assert result.exit_code == 0, result.output
    assert len(losses(tmp_path / "out")) == 2
    result = run("train", recipe, "--plain", "--out", tmp_path / "out", "--set", "run.seed=9", "--resume")
    assert result.exit_code == 0, result.output
    assert len(losses(tmp_path / "out")) == 4


def test_evaluate(trained: Path) -> None:
    result = run("evaluate", trained, "--plain", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["step"], found["images"]) == (40, 40)
    assert found["accuracy"] > 0.7
    text = run("evaluate", trained, "--plain").stdout
    assert f"loss {found['loss']:.4f}" in text


def test_predict(trained: Path, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = (load_digits().images[:3] * (255 / 16)).astype(np.uint8)
    np.save(tmp_path / "three.npy", digits)
    Image.fromarray(digits[0]).resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "zero.png")
    result = run("predict", trained, tmp_path / "three.npy", tmp_path / "zero.png", "--plain", "--json")
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [Path(answer["input"]).name for answer in answers] == [
        "three.npy[0]",
        "three.npy[1]",
        "three.npy[2]",
        "zero.png",
    ]
    assert answers[0]["class"] == answers[3]["class"] == "0"
    for answer in answers:
        assert sum(answer["all"].values()) == pytest.approx(1, abs=1e-5)
        assert answer["probability"] == max(answer["all"].values())
    assert "zero.png: 0 (" in run("predict", trained, tmp_path / "zero.png", "--plain").stdout


@pytest.mark.parametrize("content", ["no image", None])
def test_predict_says_which_input_it_cannot_read(trained: Path, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "input.png"
    if content is not None:
        file.write_text(content)
    result = run("predict", trained, file, "--plain")
    assert result.exit_code == 1
    assert f"error: {file}: cannot read as an image" in result.stderr


def test_evaluate_and_predict_through_workers(trained: Path, tmp_path: Path, workers: list[str]) -> None:
    address = ("--set", "session.placement=all", "--set", "session.scheme=tempo", "--workers", *workers[:2])
    plain, protected = (json.loads(run("evaluate", trained, "--json", *how).stdout) for how in (["--plain"], address))
    assert protected["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert protected["accuracy"] == plain["accuracy"]
    np.save(tmp_path / "one.npy", np.zeros((8, 8), dtype=np.uint8))
    plain, protected = (
        json.loads(run("predict", trained, "--json", *how, tmp_path / "one.npy").stdout)
        for how in (["--plain"], address)
    )
    assert protected["all"] == pytest.approx(plain["all"], rel=1e-4)


def test_an_unreachable_worker_is_named(recipe: Path, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/nobody.sock"
    result = run("train", recipe, "--workers", address, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert address in result.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_saves_and_the_printed_command_continues(tmp_path: Path) -> None:
    recipe = tmp_path / "job.toml"
    recipe.write_text(RECIPE.format(steps=200))
    command = [sys.executable, "-c", "from tempo.cli import main; main()"]
    arguments = ["train", str(recipe), "--out", str(tmp_path / "out"), "--scheme", "insecure-plain"]
    arguments += ["--set", "session.placement=all", "--set", "session.local_threads=1"]
    # A terminal's Ctrl-C reaches the local worker too.
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 30/"):
                os.killpg(process.pid, signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130
    last = rest.splitlines()[-1]
    done = len(losses(tmp_path / "out"))
    assert last.startswith(f"interrupted; step {done} is saved. Continue with: tempo train ")
    assert 30 <= done < 200
    again = run(*shlex.split(last.split("tempo ", 1)[1]))
    assert again.exit_code == 0, again.output
    assert len(losses(tmp_path / "out")) == 200


def test_one_liar_among_three_workers_is_banned_and_the_losses_stay(
    recipe: Path, tmp_path: Path, workers: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    address = f"unix:{tmp_path}/liar.sock"
    command = [sys.executable, "-m", "tempo.worker", "--listen", address, "--threads", "1", "--insecure-lie", "row"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as liar:
        assert any("listening" in line for line in liar.stderr), "it did not start"
        everybody = ",".join([f"{workers[0]}@a", f"{address}@b", f"{workers[1]}@c"])
        choices = ("--set", "session.placement=all", "--set", "session.divide_flops=1", "--scheme", "tempo")
        lying = run(
            *("train", recipe, "--verify", "always", "--workers", everybody, *choices, "--out", tmp_path / "lying")
        )
        liar.terminate()
    assert lying.exit_code == 0, lying.output
    plain = run("train", recipe, "--plain", "--out", tmp_path / "plain")
    assert plain.exit_code == 0
    assert losses(tmp_path / "lying") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4, abs=1e-6)
    said = [record.getMessage() for record in caplog.records if "times its tolerance" in record.getMessage()]
    assert len(said) == 1
    assert "in step 0" in said[0]  # each of its answers is a lie, so it was its first
    assert "going on without it and its operator" in said[0]


def test_weights_that_workers_update_give_the_same_losses(recipe: Path, tmp_path: Path, workers: list[str]) -> None:
    away = ("--update", "worker", "--scheme", "tempo-signed", "--workers", workers[0], "--set", "session.placement=all")
    refused = run("train", recipe, *away, "--out", tmp_path / "refused")
    assert refused.exit_code == 1
    assert "no check follows AdamW" in " ".join(refused.output.split())
    sgd = ("--set", "optimizer.name=sgd")
    result = run("train", recipe, *away, *sgd, "--out", tmp_path / "away")
    assert result.exit_code == 0, result.output
    plain = run("train", recipe, "--plain", *sgd, "--out", tmp_path / "plain")
    assert plain.exit_code == 0
    assert losses(tmp_path / "away") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4, abs=1e-6)

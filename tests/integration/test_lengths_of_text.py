"""What operators see of texts is their lengths, padded: two data sets of equal padded lengths look alike to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adopted import session_with
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny_models import llama

from tempo.recipes.finetune.examples import IGNORED, Example, batch

# Versions of PEFT and transformers that do not know each other's latest names yet.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

PAD = 16
ONE = [[4, 15, 9], [16, 2, 3]]
OTHER = [[13, 1, 2], [7, 12, 5]]
"""Tokens of each text, in two batches: none longer than 16."""

Form = tuple[int, int, str, tuple[tuple[str, str, tuple[int, ...]], ...]]


def examples(lengths: list[int], seed: int) -> list[Example]:
    """Texts of random tokens, the second half of each to be learned."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(64, (length,), generator=generator) for length in lengths]
    return [Example(ids, ids.clone().index_fill_(0, torch.arange(len(ids) // 2), IGNORED)) for ids in texts]


def forms(folder: Path) -> list[list[Form]]:
    """Step, layer, kind and tensors' forms of all that each operator got and gave, in order."""
    found: list[list[Form]] = []
    for worker in sorted(folder.iterdir()):
        found.append([])
        for file in sorted(worker.glob("*/*.safetensors"), key=lambda file: int(file.stem.split("-")[1])):
            step, _, layer, kind = file.stem.split("-")
            with safe_open(file, "pt") as opened:
                slices = {name: opened.get_slice(name) for name in sorted(opened.keys())}
                shapes = tuple((name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items())
            found[-1].append((int(step), int(layer), kind, shapes))
    return found


def seen(folder: Path, batches: list[list[int]], seed: int, pad_to: int) -> list[list[Form]]:
    """Train for a step on each batch, and evaluate on the last."""
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    with session_with("", "", transcripts=folder, scheme="split", base="public") as session:
        session.protect(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
        for number, lengths in enumerate(batches):
            texts = batch(examples(lengths, seed + number), pad_to, 64)
            optimizer.zero_grad()
            model(**texts).loss.backward()
            optimizer.step()
        with torch.no_grad():
            model(**texts)
        assert session.summary().offloaded_share > 0.5
    return forms(folder)


def test_texts_of_equal_padded_lengths_look_alike_and_of_others_do_not(tmp_path):
    one = seen(tmp_path / "one", ONE, 1, PAD)
    other = seen(tmp_path / "other", OTHER, 5, PAD)
    assert len(one) == 2
    assert min(len(messages) for messages in one) > 50
    assert one == other
    # The control: as long as they are, they show it.
    assert seen(tmp_path / "as-it-is", OTHER, 5, 1) != one

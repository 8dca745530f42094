"""Train a small language model on Shakespeare, all but The Tempest: a public base. The Tempest is the private text.

    python examples/shakespeare/make_base.py --out runs/shakespeare

writes ``base/``, a model of the Llama architecture in Hugging Face's format, and ``tempest.jsonl``. The text is
tinyshakespeare.txt from the folder that TEMPO_DATA names (``text/tinyshakespeare.txt``), or ``--text FILE``.
``--size gpt2`` makes one of GPT-2's size, which takes hours.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

TEMPEST = "Master:\nBoatswain!"
"""How the last play of the file begins."""

END = "<end>"


@dataclass(frozen=True)
class Size:
    """Of a model, and of the batches that it learns by."""

    width: int
    inner: int
    layers: int
    vocabulary: int
    rows: int
    tokens: int
    rate: float


SIZES = {
    "tiny": Size(width=64, inner=176, layers=1, vocabulary=512, rows=2, tokens=64, rate=2e-3),
    "small": Size(width=192, inner=528, layers=3, vocabulary=1024, rows=16, tokens=128, rate=2e-3),
    "gpt2": Size(width=768, inner=2048, layers=12, vocabulary=8192, rows=8, tokens=256, rate=6e-4),
}
"""Heads are of 64 features."""


def main() -> None:
    """Make both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(os.environ.get("TEMPO_DATA", "."))
    parser.add_argument("--text", type=Path, default=folder / "text" / "tinyshakespeare.txt")
    parser.add_argument("--out", type=Path, default=Path("runs/shakespeare"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--size", choices=SIZES, default="small")
    arguments = parser.parse_args()
    if not arguments.text.is_file():
        parser.error(f"{arguments.text} is not there: set TEMPO_DATA, or name the file with --text")

    public, tempest, rest = arguments.text.read_text(encoding="utf-8").partition(TEMPEST)
    arguments.out.mkdir(parents=True, exist_ok=True)
    private = passages(tempest + rest)
    (arguments.out / "tempest.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in private))

    size = SIZES[arguments.size]
    tokenizer = train_tokenizer(public, size.vocabulary)
    tokens = torch.tensor(tokenizer(public)["input_ids"])
    model = train(tokens, len(tokenizer), size, arguments.steps)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    model.save_pretrained(arguments.out / "base")
    tokenizer.save_pretrained(arguments.out / "base")
    print(f"{arguments.out / 'base'} and {len(private)} passages in {arguments.out / 'tempest.jsonl'}")


def passages(play: str, characters: int = 600) -> list[str]:
    """Speeches in a row, about so many characters at a time."""
    found = [""]
    for speech in play.strip().split("\n\n"):
        if len(found[-1]) > characters:
            found.append("")
        found[-1] += speech + "\n\n"
    return found


def train_tokenizer(text: str, vocabulary: int) -> hf.PreTrainedTokenizerFast:
    """Byte pairs of ``text``."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END)


def train(tokens: Tensor, vocabulary: int, size: Size, steps: int) -> hf.LlamaForCausalLM:
    """A plain training loop, from random weights."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64,
        max_position_embeddings=2 * size.tokens,
        tie_word_embeddings=True,
    )
    model = hf.LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {len(tokens):,} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), size.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 40, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    began = time.monotonic()
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - size.tokens, (size.rows,))
        rows = torch.stack([tokens[start : start + size.tokens] for start in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps:
            left = (time.monotonic() - began) / step * (steps - step)
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {left:.0f} s left")
    return model


if __name__ == "__main__":
    main()

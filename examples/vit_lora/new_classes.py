"""Teach a public vision transformer four classes that it never saw, by private pictures: LoRA under scheme `split`.

    python examples/vit_lora/make_base.py
    python examples/vit_lora/new_classes.py

Plain LoRA runs beside it, from the same start: on the same integers that `split` rounds the base to, and on the base
as it is. ``--seeds 5`` compares them over seeds. Two local workers play two operators; name real ones with
``--workers gpu-a:7070@one gpu-b:7070@two``.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import torch
from make_base import PUBLIC, digest, of_classes
from peft import LoraConfig, PeftModel, get_peft_model
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTForImageClassification

import tempo
from tempo.recipes.data import generator, load
from tempo.wire.integers import integers

BATCH, RANK, RATE = 32, 8, 4e-3

Rows = tuple[Tensor, Tensor]
"""Pixels (N, 3, 32, 32), float32, and labels (N,), int64."""


class Run(NamedTuple):
    """What came of it: loss of every step; loss, and the share that is right, of pictures kept apart."""

    losses: list[float]
    loss: float
    accuracy: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/vit_lora/base"))
    parser.add_argument("--out", type=Path, default=Path("runs/vit_lora/adapter"))
    parser.add_argument("--images", type=int, default=80, help="of each class, to train on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", nargs="*", default=[])
    arguments = parser.parse_args()
    if not arguments.base.is_dir():
        parser.error(f"{arguments.base} is not there: make it with make_base.py, or name it with --base")

    training, held_out, classes = pictures(arguments.images)
    print(f"base {arguments.base}, SHA-256 of its weights {digest(arguments.base)}")
    print(f"{len(training[1])} pictures of {', '.join(classes)} to train on, {len(held_out[1])} kept apart")
    runs: list[dict[str, Run]] = []
    with tempo.connect(*arguments.workers, scheme="split", base="public", placement="all") as session:
        for seed in range(arguments.seeds):
            start = adapted(arguments.base, classes, seed)
            model = session.protect(copy.deepcopy(start))
            plain = rounded(start, session.settings.split_weight_bits)
            found = {}
            for kind, one in (("split", model), ("plain, same integers", plain), ("plain, float32", start)):
                losses = train(one, training, seed, arguments.epochs)
                found[kind] = Run(losses, *measure(one, held_out))
                print(f"seed {seed}, {kind}: loss {found[kind].loss:.4f}, accuracy {found[kind].accuracy:.1%}")
            runs.append(found)
            model.save_pretrained(arguments.out)
            summary = session.summary()
            session.unprotect(model)
        print(f"{summary.offloaded_share:.1%} of the forward FLOPs of linear layers and patches went to")
        print(*summary.workers, sep="\n", end=f"\n{summary.colluding}\n")
    for kind in list(runs[0])[1:] if len(runs) > 1 else ():
        print(f"split against {kind}: {compared([(run['split'], run[kind]) for run in runs])}")


def pictures(images: int) -> tuple[Rows, Rows, list[str]]:
    """Of classes that the base never saw: so many of each to train on, all test pictures, and the classes' names."""
    source = load("cifar10")
    classes = [name for name in source.classes if name not in PUBLIC]
    training, held_out = (of_classes(part, source.classes, tuple(classes)) for part in (source.train, source.test))
    chosen = torch.cat([(training.labels == label).nonzero()[:images, 0] for label in range(len(classes))])
    numbers = source.format().numbers
    return (
        (numbers(training.images[chosen]), training.labels[chosen]),
        (numbers(held_out.images), held_out.labels),
        classes,
    )


def adapted(base: Path, classes: list[str], seed: int) -> PeftModel:
    """The base with adapters on all linear layers and a new classifier, drawn by ``seed``."""
    torch.manual_seed(seed)
    names = dict(enumerate(classes))
    model = ViTForImageClassification.from_pretrained(base, id2label=names, ignore_mismatched_sizes=True)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", modules_to_save=["classifier"])
    return get_peft_model(model, config)


def rounded(model: PeftModel, bits: int) -> PeftModel:
    """A copy whose frozen weights are integers times scales, as scheme `split` has them."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.requires_grad:
            weight_q, scales = integers(module.weight.flatten(1), bits)
            module.weight.data = (weight_q * scales).view_as(module.weight)
    return model


def train(model: nn.Module, rows: Rows, seed: int, epochs: int) -> list[float]:
    """A plain loop: it knows nothing of Tempo. Returns the loss of each step."""
    pixels, labels = rows
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(labels) // BATCH)
    losses = []
    for epoch in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator("new_classes", seed, epoch)).split(BATCH):
            loss = model(pixel_values=pixels[chosen], labels=labels[chosen]).loss
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
    pixels, labels = rows
    logits = torch.cat([model(pixel_values=part).logits for part in pixels.split(100)])
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


def compared(pairs: list[tuple[Run, Run]]) -> str:
    """How the first of each pair differs from the second, over seeds: means with a 95% interval (Student's t)."""
    loss = interval([one.loss / other.loss - 1 for one, other in pairs])
    accuracy = interval([one.accuracy - other.accuracy for one, other in pairs])
    steps = [abs(a / b - 1) for one, other in pairs for a, b in zip(one.losses, other.losses, strict=True)]
    alike = sum(step <= 1e-4 for step in steps)
    return f"loss {loss}, accuracy {accuracy}; {alike} of {len(steps)} steps within 1e-4, the furthest {max(steps):.1e}"


def interval(values: list[float]) -> str:
    """Mean, and how far its interval reaches."""
    reach = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{sum(values) / len(values):+.4%} ± {reach:.4%}"


if __name__ == "__main__":
    main()

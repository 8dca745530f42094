"""Train a small vision transformer on six of CIFAR-10's classes: a public base. The other four are the private task.

    python examples/vit_lora/make_base.py --out runs/vit_lora

writes ``base/`` in Hugging Face's format. CIFAR-10 comes from the folder that TEMPO_DATA names, or from the hub.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from pathlib import Path

import torch
import transformers as hf

from tempo.recipes.data import Format, Images, augment, generator, load

PUBLIC = ("airplane", "bird", "deer", "dog", "frog", "truck")
"""What the base learns to tell apart."""

BATCH, RATE, SEED = 64, 1e-3, 0


def main() -> None:
    """Make it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/vit_lora"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--images", type=int, default=0, help="use so many of the data set's only; 0: all")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()

    source = load("cifar10", arguments.images, arguments.images)
    training, held_out = (of_classes(images, source.classes, PUBLIC) for images in (source.train, source.test))
    torch.manual_seed(SEED)
    model = hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=arguments.width,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.width // 32,
            intermediate_size=2 * arguments.width,
            image_size=source.format().size,
            patch_size=4,
            initializer_range=0.05,  # narrow networks want more than 0.02
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(PUBLIC)),
        )
    )
    print(f"{model.num_parameters():,} parameters, {len(training):,} images of {', '.join(PUBLIC)}")
    train(model, source.format(), training, arguments.epochs)
    print(f"kept apart: accuracy {accuracy(model, source.format(), held_out):.1%} of {len(held_out):,} images")
    model.save_pretrained(arguments.out / "base")
    print(f"{arguments.out / 'base'}, SHA-256 of its weights {digest(arguments.out / 'base')}")


def of_classes(images: Images, classes: tuple[str, ...], wanted: tuple[str, ...]) -> Images:
    """The images of the classes ``wanted``, which are numbered anew in that order."""
    numbers = torch.full((len(classes),), -1)
    numbers[[classes.index(name) for name in wanted]] = torch.arange(len(wanted))
    labels = numbers[images.labels]
    return Images(images.images[labels >= 0], labels[labels >= 0])


def train(model: hf.ViTForImageClassification, form: Format, images: Images, epochs: int) -> None:
    """A plain training loop, from random weights."""
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    began = time.monotonic()
    for epoch in range(epochs):
        randomness = generator("vit_lora", SEED, epoch)
        for chosen in torch.randperm(len(images), generator=randomness).split(BATCH)[: len(images) // BATCH]:
            pixels = augment(images.images[chosen], ("flip", "crop"), randomness)
            loss = model(pixel_values=form.numbers(pixels), labels=images.labels[chosen]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.3f}  {time.monotonic() - began:.0f} s")


@torch.no_grad()
def accuracy(model: hf.ViTForImageClassification, form: Format, images: Images) -> float:
    """The share that is right."""
    model.eval()
    logits = torch.cat([model(pixel_values=form.numbers(part)).logits for part in images.images.split(256)])
    return (logits.argmax(1) == images.labels).double().mean().item()


def digest(base: Path) -> str:
    """SHA-256 of the file of weights: whoever has the same has the same base."""
    return hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()

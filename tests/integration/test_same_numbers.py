"""Whole runs: training under masks gives, step by step, the losses of plain training.

The rule is the design's: relative difference at most 1e-4 in float32, or absolute at most 1e-6. Beside it stands a
control: two plain runs that differ in nothing but their thread count, since training itself amplifies rounding.
`pytest -s` prints the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

STEPS, BATCH = 50, 16
RELATIVE, ABSOLUTE = 1e-4, 1e-6

Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


def vit() -> nn.Module:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    # Narrow networks want wider weights than ViT's usual 0.02, or they learn nothing in 50 steps.
    rest = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
    config = ViTConfig(image_size=16, patch_size=4, num_channels=1, num_labels=10, **size, **rest)
    return ViTForImageClassification(config)


def resnet() -> nn.Module:
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    return ResNetForImageClassification(config)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 3e-3)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits in an order of their own, at twice their size: ResNet halves an image twice at once."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return F.interpolate(pixels, scale_factor=2.0)[order], torch.tensor(labels)[order]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(model: nn.Module, make_optimizer: Optimizer) -> Tensor:
    images, labels = digits()
    optimizer, losses = make_optimizer(model.train()), []
    for start in range(0, STEPS * BATCH, BATCH):
        loss = F.cross_entropy(model(images[start : start + BATCH]).logits, labels[start : start + BATCH])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses, dtype=torch.float64)


def worst(losses: Tensor, expected: Tensor) -> str:
    """The largest relative and absolute difference over all steps."""
    difference = (losses - expected).abs()
    return f"{(difference / expected).max():.1e} / {difference.max():.1e}"


def same(losses: Tensor, expected: Tensor) -> bool:
    return torch.allclose(losses, expected, rtol=RELATIVE, atol=ABSOLUTE)


def test_protected_training_has_the_losses_of_plain_training(connect):
    table = Table("model", "optimizer", "loss", title=f"worst differences in {STEPS} steps")
    for column in ("tempo: rel. / abs.", "control: rel. / abs.", "MFLOPs offloaded"):
        table.add_column(column, justify="right")
    failed = []
    for make in (vit, resnet):
        for optimizer in (sgd, adamw):
            torch.manual_seed(0)
            start = make()
            # PyTorch's counter knows linear layers and convolutions, but not the attention that CPUs run.
            with threads(1), FlopCounterMode(display=False) as counter:
                plain = train(copy.deepcopy(start), optimizer)
            plain_flops = counter.get_total_flops()
            with threads(2):
                control = train(copy.deepcopy(start), optimizer)
            session = connect(2, scheme="tempo")
            protected = train(session.protect(copy.deepcopy(start)), optimizer)
            used = session.stats()
            # Nothing passes by staying at home: every product of every step but attention's went out.
            assert used.flops_offloaded == plain_flops
            assert used.flops_trusted == 0
            session.close()
            if not same(protected, plain):
                failed.append((make.__name__, optimizer.__name__))
            assert plain[-10:].mean() < plain[:10].mean()  # a run that learns nothing would prove nothing
            table.add_row(
                make.__name__,
                optimizer.__name__,
                f"{plain[0]:.3f} to {plain[-1]:.3f}",
                worst(protected, plain),
                worst(control, plain),
                f"{used.flops_offloaded / 1e6:,.0f}",
            )
    Console(width=120).print(table)
    assert not failed

"""The optimizers and learning-rate schedules a recipe can name, over those of `torch.optim`."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from msgspec import Meta
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tempo.errors import SettingsError
from tempo.recipes.table import Table

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Unit = Annotated[float, Meta(ge=0, le=1)]
Steps = Annotated[int, Meta(ge=0)]


class Sgd(Table, frozen=True, tag_field="name", tag="sgd"):
    """Stochastic gradient descent."""

    lr: Positive = 0.05
    momentum: Fraction = 0.9
    weight_decay: NotNegative = 0.0
    nesterov: bool = False

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of all parameters of ``model``."""
        if self.nesterov and not self.momentum:
            raise SettingsError("[optimizer]: nesterov needs a momentum above 0")
        return torch.optim.SGD(
            model.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


class AdamW(Table, frozen=True, tag_field="name", tag="adamw"):
    """Adam with decoupled weight decay."""

    lr: Positive = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.01

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of all parameters of ``model``."""
        return torch.optim.AdamW(
            model.parameters(), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )


class Constant(Table, frozen=True, tag_field="name", tag="constant"):
    """The same learning rate throughout, after ``warmup`` steps of linear increase."""

    warmup: Steps = 0

    def factor(self, step: int, steps: int) -> float:
        """What multiplies the learning rate at ``step`` of ``steps``."""
        return _ramp(step, self.warmup)


class Cosine(Table, frozen=True, tag_field="name", tag="cosine"):
    """Half a cosine down to the share ``final``, after ``warmup`` steps of linear increase."""

    warmup: Steps = 0
    final: Unit = 0.0

    def factor(self, step: int, steps: int) -> float:
        """What multiplies the learning rate at ``step`` of ``steps``."""
        if step < self.warmup:
            return _ramp(step, self.warmup)
        progress = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


Optimizer = Sgd | AdamW
Schedule = Constant | Cosine


def scheduler(schedule: Schedule, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """The torch scheduler that follows ``schedule`` over ``steps``."""
    return LambdaLR(optimizer, lambda step: schedule.factor(step, steps))


def _ramp(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0

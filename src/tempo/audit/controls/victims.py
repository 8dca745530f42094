"""Small trained victims for controls and tests: seconds each, of scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempo.audit import lab
from tempo.audit.knowledge import Knowledge
from tempo.audit.samples import Samples
from tempo.audit.transcript import View
from tempo.audit.truth import Truth
from tempo.recipes import data
from tempo.recipes.models import ResNetSmall, logits

CLASSES = 10
RATE = 0.05
"""Learning rate of the first step; it falls to nearly nothing."""


@dataclass(frozen=True)
class Recorded:
    """A victim, what its worker saw, and what may be known about it."""

    views: list[View]
    truth: Truth
    knowledge: Knowledge


@dataclass(frozen=True)
class Victim:
    """How to train a network on the digits, of which the attacker has some of its own.

    Args:
        build: Builds it, with fresh weights.
        size: Side of the images.
        steps: Steps in plain, before those under record.
        batch: Images in a step.
        trusted: Layers that stay trusted.
    """

    build: Callable[[], nn.Module]
    size: int = 8
    steps: int = 150
    batch: int = 64
    trusted: tuple[str, ...] = ()

    def record(self, scheme: str, steps: int = 2, **fields: Any) -> Recorded:
        """Train, the last ``steps`` under record.

        Args:
            scheme: Of the session.
            steps: How many steps to record.
            fields: More of `tempo.audit.lab.open_lab`.
        """
        source = data.load("digits")
        form = source.format(self.size)
        images, labels = form.numbers(source.train.images), source.train.labels
        members, attacker = Samples(images[:900], labels[:900]), Samples(images[1000:], labels[1000:])
        torch.manual_seed(0)
        model = self.build()
        optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
        model.train()
        for number, (x, y) in enumerate(self._batches(members, self.steps, 0)):
            optimizer.param_groups[0]["lr"] = RATE * (1 - number / (self.steps + steps))  # so that BatchNorm settles
            optimizer.zero_grad()
            _loss(model, x, y).backward()
            optimizer.step()
        batches = self._batches(members, steps, 1)
        recorded = lab.train(model, batches, _loss, optimizer=optimizer, trusted=self.trusted, scheme=scheme, **fields)
        model.eval()
        truth = recorded.truth(model)
        truth.members = members.first(360)
        truth.test = Samples(form.numbers(source.test.images), source.test.labels)
        knowledge = Knowledge(self.build, None, attacker, self.trusted)
        return Recorded(recorded.views, truth, knowledge)

    def _batches(self, samples: Samples, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randperm(len(samples), generator=generator)[: self.batch]
            yield samples.inputs[chosen], samples.labels[chosen]


def _loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits(model, x), labels)


def _mlp(activation: type[nn.Module]) -> nn.Module:
    widths = (64, 128, 128, 128)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def relu_mlp() -> Victim:
    """Four fully connected layers with ReLU between them, all of them out."""
    return Victim(lambda: _mlp(nn.ReLU), batch=256)


def gelu_mlp() -> Victim:
    """The same with GELU."""
    return Victim(lambda: _mlp(nn.GELU), batch=256)


def resnet(trusted: tuple[str, ...] = ()) -> Victim:
    """A residual network with BatchNorm, 16 channels wide."""
    return Victim(lambda: ResNetSmall(width=16).build(1, 16, CLASSES), size=16, steps=60, trusted=trusted)

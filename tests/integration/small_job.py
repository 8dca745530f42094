"""A training run of milliseconds with every kind of request, for tests that disturb its workers."""

from __future__ import annotations

import torch
from torch import nn


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 5))


def losses(model: nn.Module, steps: int) -> list[float]:
    """The loss of every step; ``model`` is trained."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        x = torch.randn(12, 3, 6, 6, generator=generator)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found

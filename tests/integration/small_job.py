"""A training run of milliseconds with every kind of request, for tests that disturb its workers."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tempo.errors import WeightsLostError
from tempo.session import Session


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 5))


def losses(model: nn.Module, steps: int, session: Session | None = None) -> list[float]:
    """The loss of every step; ``model`` is trained.

    Where ``session`` updates weights on workers and some are lost, training goes back to a checkpoint.
    """
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    if session is not None:
        session.optimizer(optimizer)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(12, 3, 6, 6, generator=generator) for _ in range(steps)]
    found: list[float] = []
    saved = 0, *copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    while len(found) < steps:
        try:
            if session is not None and len(found) == saved[0] + 2:
                saved = len(found), *copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            optimizer.zero_grad()
            loss = model(batches[len(found)]).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        except WeightsLostError:
            session.abandon_lost_weights()
            model.load_state_dict(saved[1])
            optimizer.load_state_dict(copy.deepcopy(saved[2]))
            del found[saved[0] :]
    return found

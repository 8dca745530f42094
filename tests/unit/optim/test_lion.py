"""Lion is an ordinary optimizer: against its algorithm as printed, with schedulers, groups and state_dict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempo.optim import Lion


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step), last_epoch=steps.start - 1)
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        scheduler.step()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))


def test_steps_are_those_of_the_paper_under_a_scheduler() -> None:
    ours, theirs = network(), network()
    optimizer = Lion(ours.parameters(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.2)
    train(ours, optimizer, range(10))
    momenta = [torch.zeros_like(p) for p in theirs.parameters()]
    for step in range(10):
        torch.manual_seed(step)
        theirs.zero_grad()
        theirs(torch.randn(8, 6)).square().mean().backward()
        rate = 0.1 / (1 + step)
        with torch.no_grad():
            for p, m in zip(theirs.parameters(), momenta):
                c = 0.8 * m + 0.2 * p.grad
                p -= rate * (c.sign() + 0.2 * p)
                m.copy_(0.9 * m + 0.1 * p.grad)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q)


def test_the_state_goes_through_state_dict() -> None:
    whole, halves = network(), network()
    train(whole, Lion(whole.parameters(), lr=0.1), range(6))
    first = Lion(halves.parameters(), lr=0.1)
    train(halves, first, range(3))
    second = Lion(halves.parameters(), lr=1.0)  # its own is overwritten
    second.load_state_dict(first.state_dict())
    assert {name for kept in second.state.values() for name in kept} == {"exp_avg"}
    train(halves, second, range(3, 6))
    for p, q in zip(whole.parameters(), halves.parameters()):
        assert torch.equal(p, q)


def test_a_closure_groups_and_parameters_without_gradient() -> None:
    moved, other, still = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = Lion([{"params": [moved, still]}, {"params": [other], "lr": 0.5}], lr=0.25)

    def closure() -> torch.Tensor:
        loss = (moved + other).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert moved.tolist() == [0.75, 0.75]
    assert other.tolist() == [0.5, 0.5]
    assert still.tolist() == [1, 1]
    assert moved.grad.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("wrong", "name"),
    [({"lr": -1.0}, "lr"), ({"betas": (0.9, 1.0)}, "betas"), ({"weight_decay": -1.0}, "weight_decay")],
)
def test_what_is_out_of_range_is_said(wrong: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Lion([nn.Parameter(torch.ones(2))], **wrong)

"""Muon is PyTorch's, but for its precision, and so commutes with rotations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tempo.optim import Muon

SHAPES = [(6, 4), (4, 6), (5, 5)]


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step), last_epoch=steps.start - 1)
    for step in steps:
        for number, p in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * step + number)
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()
        scheduler.step()


def matrices(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


@pytest.mark.parametrize("options", [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_torch_s_with_the_iteration_in_the_parameter_s_precision(
    options: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, rounded = matrices(dtype), matrices(dtype), matrices(dtype)
    train(Muon(ours, lr=0.1, **options), ours, range(5))
    train(torch.optim.Muon(rounded, lr=0.1, **options), rounded, range(5))
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)  # which PyTorch's iteration begins with
    train(torch.optim.Muon(theirs, lr=0.1, **options), theirs, range(5))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for p, q, r in zip(ours, theirs, rounded):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        assert tolerance < (p - r).abs().max() < 0.1


def test_the_state_goes_through_state_dict() -> None:
    whole, halves = matrices(), matrices()
    train(Muon(whole, lr=0.1), whole, range(6))
    first = Muon(halves, lr=0.1)
    train(first, halves, range(3))
    second = torch.optim.Muon(halves, lr=0.1)  # of one kind: PyTorch's reads what ours wrote, and the other way round
    second.load_state_dict(first.state_dict())
    third = Muon(halves, lr=1.0)
    third.load_state_dict(second.state_dict())
    train(third, halves, range(3, 6))
    for p, q in zip(whole, halves):
        assert torch.equal(p, q)


def test_a_closure_and_parameters_without_gradient() -> None:
    moved, still = (nn.Parameter(torch.eye(2)) for _ in range(2))
    optimizer = Muon([moved, still])

    def closure() -> Tensor:
        loss = moved.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0
    assert not torch.equal(moved, torch.eye(2))
    assert torch.equal(still, torch.eye(2))
    assert torch.equal(moved.grad, torch.ones(2, 2))


def test_vectors_are_refused_as_by_torch() -> None:
    with pytest.raises(ValueError, match="2D"):
        Muon([nn.Parameter(torch.ones(3))])

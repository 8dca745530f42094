from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tempo.errors import SettingsError
from tempo.recipes.optimizers import AdamW, Constant, Cosine, Sgd, scheduler


@given(warmup=st.integers(0, 20), steps=st.integers(1, 60), final=st.floats(0, 1))
def test_a_cosine_rises_then_falls_to_its_final_share(warmup: int, steps: int, final: float) -> None:
    cosine = Cosine(warmup=warmup, final=final)
    factors = [cosine.factor(step, steps) for step in range(steps + 1)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    if steps > warmup:
        assert factors[-1] == pytest.approx(final, abs=1e-12)


def test_the_scheduler_sets_the_rate_of_every_step() -> None:
    model = nn.Linear(2, 2)
    optimizer = Sgd(lr=0.5).build(model)
    schedule = scheduler(Constant(warmup=4), optimizer, 10)
    rates = []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_options_reach_torch() -> None:
    group = AdamW(lr=0.2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3).build(nn.Linear(2, 2)).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.2, (0.8, 0.9), 1e-6, 0.3)
    optimizer = Sgd(lr=0.2, momentum=0.7, nesterov=True, weight_decay=0.1).build(nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.7, True, 0.1)
    with pytest.raises(SettingsError, match="nesterov needs a momentum"):
        Sgd(momentum=0.0, nesterov=True).build(nn.Linear(2, 2))

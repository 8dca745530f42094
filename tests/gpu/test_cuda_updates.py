"""Weights on a CUDA device are updated there as on a CPU, and all memory comes back. Run with ``make test-gpu``."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from tempo.wire.messages import Adam, Linear, Lion, Muon, Rule, Sgd
from tempo.worker.budget import Budget
from tempo.worker.compute import Incoming, TorchCompute
from tempo.worker.refusal import Refusal
from tempo.worker.store import Numbers
from tempo.worker.update import apply

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ADAM = Adam(0.1, 0.9, 0.99, 1e-8, 0.01, decoupled=True, amsgrad=True, maximize=False, steps=0)
RULES: list[Rule] = [
    Sgd(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.01, nesterov=False, maximize=False),
    ADAM,
    Lion(0.1, 0.9, 0.99, 0.01),
    Muon(0.1, 0.2, 0.1, 0.95, nesterov=True, coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, iterations=5),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_training_on_a_cuda_device_is_training_here(rule):
    torch.manual_seed(0)
    w, state = torch.randn(64, 32, dtype=torch.float64), {}
    compute, limit = TorchCompute(torch.device("cuda")), 1 << 20
    budget = Budget(limit)
    account = budget.open()
    numbers = Numbers(compute, account)
    numbers.put_weight(1, {"w": Incoming(w.clone())})
    assert numbers.weight(1).is_cuda
    for step in range(3):
        x, g = torch.randn(16, 32, dtype=torch.float64), torch.randn(16, 64, dtype=torch.float64)
        numbers.put_operand(1, Incoming(x))
        numbers.accumulate(1, Linear(), g, numbers.operand(1))
        norm = torch.empty(1, dtype=torch.float64)
        compute.norm(numbers.weight(1, "gradient"), norm)
        torch.testing.assert_close(norm, (g.t() @ x).norm()[None])
        now = replace(rule, steps=step) if isinstance(rule, Adam) else rule
        numbers.update(1, now, 0.5)
        apply(now, w, 0.5 * g.t() @ x, state)
    for name, expected in {"w": w, **state}.items():
        found = torch.empty_like(w)
        assert numbers.weight(1, name).is_cuda
        compute.fetch(numbers.weight(1, name), found)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    with pytest.raises(Refusal):
        budget.reserve(limit)
    numbers.forget(weights=[1], operands=[1])
    account.trim()
    budget.reserve(limit)  # or it is refused

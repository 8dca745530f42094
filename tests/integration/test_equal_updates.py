"""Updates on workers give the numbers of updates here, and of plain PyTorch, for every pair of scheme and optimizer that
may be used; ``benchmarks/updates/equality.py`` does the same for longer.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Connect
from torch import Tensor, nn
from torch.nn import functional as F

from tempo.errors import UpdateError
from tempo.optim import Lion, Muon
from tempo.session import Session

STEPS, ROWS, WIDTH = 10, 40, 32
REKEY_ROWS = 3 * ROWS
"""Masks expire, and everything is fetched, in the midst of a run."""

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

ROTATING: dict[str, Build] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "weight decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "muon": lambda p: Muon(p, 0.02, weight_decay=0.1),
}
ELEMENTWISE: dict[str, Build] = {
    "adam": lambda p: torch.optim.Adam(p, 3e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.1),
    "lion": lambda p: Lion(p, 3e-3, weight_decay=0.1),
}
NOT_LINEAR = ("muon", *ELEMENTWISE)
PAIRS = [
    *((scheme, name) for scheme in ("insecure-plain", "tempo-signed") for name in (*ROTATING, *ELEMENTWISE)),
    *(("mix", name) for name in ROTATING),
]


class Network(nn.Module):
    """Two layers that share their input, and one more; without biases, so that Muon can take all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """The losses. Gradients are dropped where many loops do it: between forward and backward pass."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    x, losses = torch.randn(ROWS, WIDTH, generator=generator), []
    for _ in range(STEPS):
        loss = F.mse_loss(model(x), x @ teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def protected(session: Session, build: Build) -> tuple[Tensor, dict[str, Tensor]]:
    model = session.protect(Network())
    losses = train(model, session.optimizer(build(list(model.parameters()))))
    return losses, {name: w.clone() for name, w in model.state_dict().items()}


@pytest.mark.parametrize(("scheme", "name"), PAIRS)
def test_updates_on_workers_are_those_of_plain_training(connect: Connect, scheme: str, name: str):
    build = {**ROTATING, **ELEMENTWISE}[name]
    plain = Network()
    expected = train(plain, build(list(plain.parameters()))), plain.state_dict()
    verify = "off" if name in NOT_LINEAR else "always"
    fields = {"scheme": scheme, "verify": verify, "rekey_rows": REKEY_ROWS}
    away = connect(update="worker", **fields)
    found = protected(away, build)
    # Rekeys apart, no gradient and no weight came here: nothing passes by staying at home.
    assert away.stats().decryptions["dw"] == 0
    for losses, weights in (protected(connect(update="trusted", **fields), build), expected):
        torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=0)
        for key, w in weights.items():
            assert float((found[1][key] - w).norm() / w.norm()) < 1e-5
    assert expected[0][-1] < 0.98 * expected[0][0]  # a run that learns nothing would prove nothing


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_pair_that_is_not_equal_is_refused(connect: Connect, name: str):
    session = connect(scheme="mix", update="worker", verify="off")
    model = session.protect(Network())
    with pytest.raises(UpdateError, match="does not commute with the masks of scheme 'mix'"):
        session.optimizer(ELEMENTWISE[name](list(model.parameters())))

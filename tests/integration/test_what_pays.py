"""What pays goes out, layer by layer and group by group; what does not is plain PyTorch, and the summary says why."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tempo.engine.costs import Rates


def data(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


class SharedInput(nn.Module):
    """Three layers on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 4), nn.Linear(12, 4), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


class Priced:
    """A planner's costs of the test's choosing."""

    def __init__(self, pays: Callable[[tuple[int, ...]], bool]) -> None:
        self.pays = pays

    def rates(self, scheme, product, x, w, dtype) -> Rates:
        free = dict.fromkeys(("w", "x", "y", "g", "dx", "dw"), 0.0)
        return Rates(free, free, free, 1.0 if self.pays(w) else 0.0)


def test_layers_that_pay_only_together_go_out_together(connect):
    session = connect(placement="auto")
    session._engine.planner._costs = Priced(lambda w: w[0] == 4 + 4 + 6)
    plain = SharedInput()
    model = session.protect(copy.deepcopy(plain), offload=["*"])
    for _ in range(4):
        for network in (plain, model):
            network.zero_grad()
            network(data(9, 12)).square().sum().backward()
        torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-4, atol=1e-5)
    # Seen to share in the first pass, placed together from the third on at the latest.
    assert {line.name: line.offloaded > 0 for line in session.summary().lines} == dict.fromkeys("qkv", True)
    before = session.stats()
    model(data(9, 12))
    assert (session.stats() - before).encryptions["x"] == 1


def test_what_stays_trusted_is_no_neighbour(connect):
    session = connect(placement="auto")
    session._engine.planner._costs = Priced(lambda w: True)
    model = session.protect(SharedInput(), offload=["*"], trusted=["k"])
    for _ in range(6):
        model(data(9, 12)).square().sum().backward()
    assert {line.name: line.offloaded > 0 for line in session.summary().lines} == {"q": True, "k": False, "v": True}


def test_where_nothing_pays_all_is_plain_pytorch(connect):
    session = connect(placement="auto", memory_format="preserve")  # or maps would be channels last
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))
    model = session.protect(copy.deepcopy(plain), offload=["*"])
    before = session.stats()
    with session.trusted_products(model) as found:
        model(data(4, 2, 6, 6))
    assert found.total == 4 * (2 * 16 * 3 * 2 * 9 + 2 * 48 * 5)  # and nothing of what was measured
    for rows in (4, 4, 4, 4, 4, 4, 2, 4):  # taken for granted in the end, until the batch is another one
        for network in (plain, model):
            network.zero_grad()
            network(data(rows, 2, 6, 6)).square().sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(plain), strict=True))
    used = session.stats() - before
    assert (used.flops_offloaded, used.encryptions) == (0, {"x": 0, "w": 0, "g": 0})
    assert used.flops_trusted == 34 * (2 * 16 * 3 * 2 * 9 + 2 * 48 * 5)
    assert all("does not pay" in line.reason for line in session.summary().lines)


def test_placement_follows_what_is_asked_of_a_layer(connect):
    session = connect(placement="auto")
    session._engine.planner._costs = Priced(lambda w: False)
    model = session.protect(nn.Linear(8, 8), offload=["*"])
    for _ in range(6):
        model(data(3, 8))
    session._engine.planner._costs = Priced(lambda w: True)
    model(data(3, 8))
    assert session.stats().encryptions["x"] == 0
    model(data(5, 8))  # another size is another question
    assert session.stats().encryptions["x"] == 1
    model.requires_grad_(False)
    model(data(3, 8))
    assert session.stats().encryptions["x"] == 2

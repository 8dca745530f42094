"""The numbers do not depend on how many workers compute them, how fast these are or how they are reached."""

from __future__ import annotations

import copy
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tempo
from tempo.session import Session
from tempo.wire import identity
from tempo.worker.server import Options, Server

SHARES = [[1.0], [0.5, 0.5], [0.9, 0.1], [0.5, 0.3, 0.2], [0.98, 0.01, 0.01]]


class Network(nn.Module):
    """Two convolutions and attention over their pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.pointwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1)
        self.attention, self.head = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.pointwise(torch.tanh(self.convolution(x)))).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Network()
    return plain, copy.deepcopy(plain)


def batch(rows: int) -> Tensor:
    torch.manual_seed(rows)
    return torch.randn(rows, 3, 6, 6)


def same_gradients(model: nn.Module, plain: nn.Module, rows: int) -> bool:
    for network in (model, plain):
        network.zero_grad()
        network(batch(rows)).square().sum().backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return all(bool((p.grad - q.grad).norm() <= 1e-5 * q.grad.norm() + 1e-7) for p, q in pairs)


def losses(model: nn.Module, steps: int = 5) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(batch(7 + step)).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def sent(session: Session) -> list[int]:
    return [link.bytes_sent for link in session._engine.links]


@pytest.mark.parametrize("scheme", ["tempo", "insecure-plain"])
@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_unequal_workers_give_the_numbers_of_plain_pytorch(connect, scheme, shares):
    session = connect(len(shares), scheme=scheme)
    session._engine.crew.shares = shares
    plain, model = networks()
    session.protect(model)
    before = sent(session)  # by the measurements
    for rows in (1, 2, 7, 13):
        assert same_gradients(model, plain, rows)
    assert losses(model) == pytest.approx(losses(plain), rel=1e-4, abs=1e-6)
    assert session.stats().flops_trusted == 0
    assert session.stats().flops_offloaded > 0
    used = [after - b for after, b in zip(sent(session), before, strict=True)]
    assert min(used) > 0
    assert used == sorted(used, reverse=True) or len(set(shares)) < len(shares)


def test_the_same_flops_go_out_whoever_computes_them(connect):
    counts = []
    for shares in SHARES:
        session = connect(len(shares), scheme="tempo")
        session._engine.crew.shares = shares
        losses(session.protect(networks()[1]))
        used = session.stats()
        counts.append((used.flops_offloaded, used.encryptions))
    assert counts == counts[:1] * len(SHARES)


def test_small_products_go_whole_to_one_worker_and_large_ones_to_all(connect):
    small, large = nn.Linear(4, 4), nn.Linear(32, 32)
    session = connect(3, scheme="tempo", divide_flops=2 * 8 * 32 * 32)
    session.protect(nn.Sequential(small, large))
    before = sent(session)
    small(torch.randn(8, 4)).sum().backward()
    used = [after - b for after, b in zip(sent(session), before, strict=True)]
    assert sorted(used)[:2] == [0, 0]
    assert max(used) > 0
    before = sent(session)
    large(torch.randn(8, 32)).sum().backward()
    assert all(after > b for after, b in zip(sent(session), before, strict=True))


def test_small_layers_are_spread_over_the_workers(connect):
    session = connect(2, scheme="tempo", divide_flops=1 << 40)
    model = session.protect(nn.Sequential(*(nn.Linear(4, 4) for _ in range(8))))
    plain = copy.deepcopy(model)
    session.unprotect(plain)
    before = sent(session)
    assert torch.allclose(model(torch.ones(3, 4)), plain(torch.ones(3, 4)), atol=1e-6)
    assert all(after > b for after, b in zip(sent(session), before, strict=True))


def test_fewer_rows_than_workers(connect):
    session = connect(3, scheme="tempo")
    model = session.protect(nn.Linear(5, 4))
    for rows in (1, 2, 3):
        x = torch.randn(rows, 5)
        assert torch.allclose(model(x), nn.functional.linear(x, model.weight, model.bias), atol=1e-5)
    assert session.stats().encryptions["x"] == 3


def test_workers_over_tcp_and_tls(tmp_path: Path):
    key, _, _ = identity.generate(tmp_path, "worker")
    mine, pub, _ = identity.generate(tmp_path, "trusted")
    with ExitStack() as stack:
        addresses = []
        for _ in range(2):
            server = Server(Options(identity=key, peers=pub))
            addresses.append(server.listen("127.0.0.1:0"))
            thread = threading.Thread(target=server.accept_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.close)
        settings = {"identity": str(mine), "peers": str(tmp_path / "worker.pub")}
        session = stack.enter_context(
            tempo.connect(*addresses, scheme="tempo", placement="all", divide_flops=1, **settings)
        )
        plain, model = networks()
        session.protect(model)
        before = sent(session)  # by the measurements
        assert losses(model) == pytest.approx(losses(plain), rel=1e-4, abs=1e-6)
        assert session.stats().flops_trusted == 0
        assert all(after > b for after, b in zip(sent(session), before, strict=True))

"""Gradients that are zero for most rows (class tokens, masked labels): workers get the live rows alone, afresh."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SCHEMES = ["mix", "mix-tuned"]


class Attentive(nn.Module):
    """Three projections that share their input, then a fourth; one token of each sequence is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))
        self.o = nn.Linear(64, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)) * torch.sigmoid(self.k(x)) + self.v(x))[:, 0]


def gradients(model: nn.Module, x: Tensor, weights: Tensor | float = 1.0, times: int = 1) -> list[Tensor]:
    x = x.clone().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    y = model(x)
    for number in range(times):
        (y.square() * weights).sum().backward(retain_graph=number < times - 1)
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def messages(session) -> list[tuple[str, dict, dict]]:
    """What goes out from now on: kind, shapes of operands, shapes wanted."""
    sent = []
    for link in session._engine.links:

        def request(message, tensors, wants, exchange=None, original=link.request):
            shapes = {name: tuple(t.shape) for name, t in tensors.items()}
            sent.append((type(message).__name__, shapes, {name: shape for name, (shape, _) in wants.items()}))
            return original(message, tensors, wants, exchange)

        link.request = request
    return sent


def check(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert float((a - b).norm()) <= 2e-5 * float(b.norm()) + 1e-30
    assert torch.equal(actual[1] == 0, expected[1] == 0)


@pytest.mark.parametrize("operators", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_live_rows_go_out_again_by_themselves(connect, scheme, operators):
    torch.manual_seed(0)
    plain, x = Attentive(), torch.randn(40, 12, 64)
    session = connect(operators, operators, scheme=scheme)
    session._engine.crew.shares = [1 / operators] * operators
    model = session.protect(copy.deepcopy(plain))
    check(gradients(model, x), gradients(plain, x))
    sent = messages(session)
    check(gradients(model, x), gradients(plain, x))  # now query, key and value are one product
    backward = [(shapes["g"][0], wants) for kind, shapes, wants in sent if kind == "Backward"]
    # 40 of 480 rows are live; workers learn "at most 64", and get as many rows of the input to keep.
    assert {sum(rows) for rows in split(backward, operators, scheme)} == {64}
    assert all(wants["dx"][0] == rows for rows, wants in backward)
    kept = [shapes["x"][0] for kind, shapes, wants in sent if kind == "Forward" and not wants]
    assert Counter(kept) == Counter(rows for rows, _ in backward)
    assert session.stats().flops_trusted == 0


def split(backward: list, operators: int, scheme: str) -> list[list[int]]:
    """Rows of each product's messages: columns divided over operators, all have all rows; else rows are divided."""
    rows = [number for number, _ in backward]
    together = 1 if scheme == "mix-tuned" else operators
    return [rows[i : i + together] for i in range(0, len(rows), together)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gradient_of_zeros_alone(connect, scheme):
    plain, x = Attentive(), torch.randn(40, 12, 64)
    session = connect(scheme=scheme)
    model = session.protect(copy.deepcopy(plain))
    sent = messages(session)
    found = gradients(model, x, weights=0.0)
    assert not any(gradient.any() for gradient in found[1:])
    assert {shapes["g"][0] for kind, shapes, _ in sent if kind == "Backward"} == {32}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_after_one_another(connect, scheme):
    # The first goes out by live rows alone; the second is whole, and the third meets no mask that the second met.
    torch.manual_seed(0)
    plain, x = nn.Linear(64, 48), torch.randn(300, 64)

    def run(model: nn.Module) -> list[Tensor]:
        inputs = x.clone().requires_grad_()
        y, found = model(inputs), []
        for mask in (torch.arange(300) < 3, torch.ones(300), torch.ones(300)):
            loss = (y.square() * mask.unsqueeze(1)).sum()
            found += torch.autograd.grad(loss, [inputs, *model.parameters()], retain_graph=True)
        return found

    session = connect(scheme=scheme)
    for actual, expected in zip(run(session.protect(copy.deepcopy(plain))), run(plain), strict=True):
        assert float((actual - expected).norm() / expected.norm()) <= 2e-5
    assert session.stats().encryptions == {"x": 3, "w": 3, "g": 3}


@pytest.mark.parametrize("wanted", ["input", "weight"])
def test_only_what_is_wanted_is_sent_again(connect, wanted):
    plain, x = nn.Linear(64, 48), torch.randn(300, 64, requires_grad=wanted == "input")
    plain.requires_grad_(wanted == "weight")
    session = connect(scheme="mix")
    model = session.protect(copy.deepcopy(plain))
    sent = messages(session)
    leaves = [x] if wanted == "input" else [model.weight]
    (found,) = torch.autograd.grad(model(x)[:3].square().sum(), leaves)
    (expected,) = torch.autograd.grad(plain(x)[:3].square().sum(), [x] if wanted == "input" else [plain.weight])
    assert float((found - expected).norm() / expected.norm()) <= 1e-5
    resent = [shapes for kind, shapes, wants in sent if kind == "Forward" and not wants]
    assert len(resent) == (wanted == "weight")


def test_an_input_changed_in_place_is_noticed_as_in_plain_pytorch(connect):
    model = connect(scheme="mix").protect(nn.Linear(64, 48))
    x = torch.randn(300, 64)
    y = model(x)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y[:3].sum().backward()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_padded_sequences_and_dead_units_give_the_numbers_of_plain_pytorch(connect, scheme):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 48))
    with torch.no_grad():
        plain[0].bias[:20] = -1e3  # units that never fire: dead columns of X, and of G one layer below
    x = torch.randn(10, 30, 64)
    x[:, 25:] = 0
    x[..., 5] = 0
    session = connect(3, 2, scheme=scheme)
    model = session.protect(copy.deepcopy(plain))
    mask = torch.ones(10, 30, 1)
    mask[:, 28:] = 0
    found, expected = gradients(model, x, mask), gradients(plain, x, mask)
    check(found, expected)
    for actual, true in zip(found[2:], expected[2:], strict=True):
        assert torch.equal(actual == 0, true == 0)
    assert session.stats().flops_trusted == 0


@pytest.mark.parametrize("live", [3, 280])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_are_recalled_too(connect, live, reentrant):
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48)), torch.randn(300, 64)
    with torch.no_grad():
        plain[0].bias[:9] = -1e3
    model = connect(scheme="mix").protect(copy.deepcopy(plain))
    results = []
    for net in (model, plain):
        inputs = x.clone().requires_grad_()
        checkpoint(net, inputs, use_reentrant=reentrant)[:live].square().sum().backward()
        results.append([inputs.grad, *(parameter.grad for parameter in net.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert float((actual - expected).norm() / expected.norm()) <= 1e-5

"""Calls in parts: plain PyTorch's numbers, all parts sent before the first is awaited, nothing lost with a worker."""

from __future__ import annotations

import copy
from functools import wraps

import pytest
import torch
from test_lying_workers import session_with
from torch import Tensor, nn

from tempo.engine.call import Call


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 40))


def data(rows: int = 140) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, 40)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y[::3].square().sum().backward()  # two rows of three have no gradient
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("overlap", [2, 3, 4])
@pytest.mark.parametrize("scheme", ["insecure-plain", "tempo", "mix", "mix-tuned"])
def test_numbers_are_those_of_plain_pytorch(connect, scheme, overlap):
    session = connect(scheme=scheme, overlap=overlap)
    plain = network()
    model = session.protect(copy.deepcopy(plain))
    for rows in (140, 140, 7):
        before = session.stats()
        expected = gradients(plain, data(rows))
        for actual, wanted in zip(gradients(model, data(rows)), expected, strict=True):
            assert (actual - wanted).norm() <= 1e-5 * wanted.norm()
        used = (session.stats() - before).encryptions
        mixes = scheme.startswith("mix")
        parts = overlap if rows == 140 else 1 if mixes else overlap  # a part of less than a row block would be filled
        assert used["x"] >= 2 * parts
    with torch.no_grad():
        assert (model(data()) - plain(data())).norm() <= 1e-5 * plain(data()).norm()


def test_a_weight_is_masked_once_for_all_parts_even_where_masks_are_fresh_at_every_call(connect):
    session = connect(scheme="mix-tuned", overlap=4)
    model = session.protect(nn.Linear(40, 48)).eval()
    with torch.no_grad():
        model(data())
    assert session.stats().encryptions == {"x": 4, "w": 1, "g": 0}


def test_every_part_is_on_its_way_before_the_first_is_awaited(connect, monkeypatch):
    told: list[str] = []

    def tell(name: str, and_result: bool = False) -> None:
        original = getattr(Call, name)

        @wraps(original)
        def telling(*args, **kwargs):
            told.append(name)
            result = original(*args, **kwargs)
            if not and_result:
                return result

            def finishing(*added):
                told.append("finish_" + name.removeprefix("begin_"))
                return result(*added)

            return finishing

        monkeypatch.setattr(Call, name, telling)

    tell("begin")
    tell("finish")
    tell("begin_sending", and_result=True)
    session = connect(scheme="tempo", overlap=3)
    model = session.protect(nn.Linear(40, 48))
    model(data().requires_grad_()).square().sum().backward()
    assert told == ["begin"] * 3 + ["finish"] * 3 + ["begin_sending"] * 3 + ["finish_sending"] * 3


def test_a_second_backward_pass_and_unused_gradients(connect):
    session = connect(scheme="mix", overlap=2)
    plain = network()
    model = session.protect(copy.deepcopy(plain))
    results = []
    for net in (plain, model):
        net[0].weight.requires_grad_(False)
        x = data().requires_grad_()
        y = net(x).square().sum()
        y.backward(retain_graph=True)
        y.backward()
        results.append([x.grad, net[2].weight.grad, net[2].bias.grad])
    for actual, wanted in zip(results[1], results[0], strict=True):
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("every", [1, 3, 4, 5])
def test_a_liar_in_the_middle_of_a_call_changes_nothing(every):
    plain = network()
    with session_with(f"row:{every}", "", overlap=3) as session:
        model = session.protect(copy.deepcopy(plain))
        for _ in range(2):
            for actual, wanted in zip(gradients(model, data()), gradients(plain, data()), strict=True):
                assert (actual - wanted).norm() <= 1e-5 * wanted.norm()
        assert [incident.address for incident in session.incidents] == ["worker0:0@operator0"]

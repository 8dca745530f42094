"""Small calls of which nothing goes out run as the plain model; all others protected, whatever came before."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from tempo.layers.base import Protected
from tempo.trusted import small_calls


class Noting(nn.Module):
    """Two layers; notes whether the first is protected while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 4)
        self.noted: list[bool] = []

    def forward(self, x, fail=False):
        self.noted.append(isinstance(self.up, Protected))
        if fail:
            raise KeyError
        return self.down(torch.relu(self.up(x)))


@pytest.fixture
def model(connect):
    return connect(placement="auto").protect(Noting(), trusted=["*"])


def calls(model, x, count=10):
    for _ in range(count):
        model(x)
    return model.noted[-count:]


def test_alike_calls_run_plain_after_some_and_classes_come_back(model):
    seen = calls(model, torch.randn(5, 8), 130)
    assert seen[0]
    assert not seen[10]
    assert 6 < sum(seen) < 13  # the first few, and a look from time to time
    assert isinstance(model.up, Protected)


def test_another_kind_of_call_is_looked_at_by_itself(model):
    calls(model, torch.randn(5, 8))
    assert calls(model, torch.randn(6, 8), 1) == [True]
    assert calls(model, torch.randn(5, 8, requires_grad=True), 1) == [True]
    with torch.no_grad():
        assert calls(model, torch.randn(5, 8), 1) == [True]
    assert calls(model, torch.randn(5, 8), 1) == [False]
    model.up.requires_grad_(False)
    assert calls(model, torch.randn(5, 8), 1) == [True]


def test_large_products_stay_with_native_kernels(model, monkeypatch):
    monkeypatch.setattr(small_calls, "SMALL", 2 * 5 * 8)
    assert all(calls(model, torch.randn(5, 8)))


def test_what_goes_out_never_runs_plain(connect):
    session = connect()
    model = session.protect(Noting())
    assert all(calls(model, torch.randn(5, 8)))
    assert session.summary().offloaded_share == 1


def test_calls_that_could_not_be_sent_say_nothing_of_others_like_them(connect):
    session = connect()
    model = session.protect(Noting())
    x = torch.randn(5, 8)
    with forward_ad.dual_level():
        assert all(calls(model, x))
    assert session.stats().encryptions["x"] == 0
    model(x)
    assert session.stats().encryptions["x"] == 2


def test_an_error_in_a_plain_call_leaves_layers_protected(model):
    x = torch.randn(5, 8)
    for _ in range(10):
        with pytest.raises(KeyError):
            model(x, fail=True)
    calls(model, x)
    model.noted.clear()
    with pytest.raises(KeyError):
        model(x, fail=True)
    assert isinstance(model.up, Protected)


def test_a_layer_that_was_given_another_class_since_keeps_it(model):
    x = torch.randn(5, 8)
    calls(model, x)
    parametrize.register_parametrization(model.up, "weight", nn.Tanh())
    other = type(model.up)
    expected = torch.nn.functional.linear(torch.relu(model.up(x)), model.down.weight, model.down.bias)
    torch.testing.assert_close(model(x), expected)
    assert type(model.up) is other


def test_copies_and_pickles_know_nothing_of_it(model, connect):
    x = torch.randn(5, 8)
    alone = connect(placement="auto").protect(nn.Linear(8, 4), trusted=["*"])
    calls(model, x)
    for _ in range(10):
        alone(x)
    for one in (model, alone):
        torch.testing.assert_close(copy.deepcopy(one)(x), one(x))
        stored = pickle.loads(pickle.dumps(one))  # noqa: S301 - our own
        torch.testing.assert_close(stored(x), one(x))
        assert not any(name.startswith("_tempo") for name in vars(stored))

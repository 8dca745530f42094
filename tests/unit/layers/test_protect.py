"""Protecting and taking back: what is swapped, what is left alone, and what undoes it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tempo.errors import SettingsError
from tempo.layers import REGISTRY
from tempo.layers.base import Protected, overrides, protected_class


class Padded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 2)


class Child(Own):
    """Inherits what is not known to pass the product on."""


class OwnConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x * 2, self.weight, self.bias)


@pytest.mark.parametrize(
    ("module", "methods", "expected"),
    [
        (nn.Linear(2, 2), ("forward",), None),
        (Padded(2, 2), ("forward",), None),
        (Own(2, 2), ("forward",), "Own.forward"),
        (Child(2, 2), ("forward",), "Own.forward"),
        (OwnConvolution(2, 2, 1), ("forward", "_conv_forward"), None),
    ],
)
def test_overrides_are_judged_by_whether_they_pass_the_product_on(module, methods, expected):
    base = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    assert overrides(module, base, methods) == expected


@pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.base.__name__)
def test_a_protected_class_passes_for_its_original(entry):
    cls = protected_class(entry.base, entry.protected)
    assert issubclass(cls, entry.base)
    assert issubclass(cls, Protected)
    assert (cls.__name__, cls.__module__, cls.__doc__) == (
        entry.base.__name__,
        entry.base.__module__,
        entry.base.__doc__,
    )
    assert protected_class(entry.base, entry.protected) is cls


def test_a_lazy_layer_is_left_as_it_is(connect):
    model = nn.Sequential(nn.LazyLinear(3))
    session = connect()
    session.protect(model)
    model(torch.ones(2, 4))
    assert type(model[0]) is nn.Linear
    session.unprotect(model)
    torch.save(model, io.BytesIO())
    assert "_tempo" not in vars(model[0])


def test_a_parametrization_added_later_must_be_removed_first(connect):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.ones(2, 4)
    expected = model(x)
    session = connect()
    session.protect(model)
    parametrizations.weight_norm(model[0])
    torch.testing.assert_close(model(x), expected)
    assert session.stats().encryptions["x"] == 1
    with pytest.raises(SettingsError, match=r"layer '0' .*ParametrizedLinear after protect"):
        session.unprotect(model)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        torch.save(model, io.BytesIO())
    parametrize.remove_parametrizations(model[0], "weight")
    session.unprotect(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_a_parametrized_attention_projection_is_one_site_of_its_own(connect):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    parametrizations.weight_norm(plain.out_proj)
    session = connect()
    model = session.protect(copy.deepcopy(plain))
    x, y = torch.linspace(-1, 1, 48).sin().view(2, 3, 8), torch.linspace(-1, 1, 64).cos().view(2, 4, 8)
    for _ in range(3):
        torch.testing.assert_close(model(x, y, y)[0], plain(x, y, y)[0], rtol=1e-5, atol=1e-5)
    assert session.stats().flops_trusted == 0
    assert "out" in model._tempo.parts

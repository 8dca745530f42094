"""What every scheme must keep to, whatever it does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo import schemes
from tempo.errors import SettingsError, UnsafeError
from tempo.keys import KeySchedule
from tempo.schemes.base import Problem, Target
from tempo.schemes.single import divide
from tempo.wire.messages import Linear


def empty(worker, shape, dtype):
    return torch.empty(shape, dtype=dtype)


def encode(name: str, rows: int = 40):
    keys, target = KeySchedule(), Target(0, "operator", 1.0)
    scheme = schemes.create(name)
    w, x = torch.randn(33, 36), torch.randn(rows, 36)
    weight = scheme.encode_weight(Problem(Linear(), torch.float32), w, keys.fresh(1, "w"), [target], empty)
    return keys, weight.encode_input(x, keys.fresh(1, "x"), [target], empty, lambda: w), x, w


@pytest.mark.parametrize("name", [n for n in schemes.names() if not schemes.create(n).traits.exact])
def test_a_second_gradient_never_meets_the_same_masks(name):
    keys, source, x, w = encode(name)

    def send():
        g = torch.randn(40, 33)
        source.encode_gradient(g, keys.fresh(1, "g"), empty, lambda: x, lambda: w, want_dw=True)

    send()
    with pytest.raises(UnsafeError):
        send()


@pytest.mark.parametrize("name", schemes.names())
def test_a_scheme_says_what_it_protects(name):
    traits = schemes.create(name).traits
    assert traits.protects
    assert "secure" not in traits.protects
    if "nothing" in traits.protects:
        assert name.startswith("insecure-")


def test_unknown_scheme_names_the_nearest():
    with pytest.raises(SettingsError, match="'tempo'"):
        schemes.create("tepmo")


@given(st.integers(0, 100), st.lists(st.floats(0.01, 10), min_size=1, max_size=5))
def test_rows_are_divided_completely_and_in_proportion(rows, shares):
    targets = [Target(i, "operator", share) for i, share in enumerate(shares)]
    parts = divide(rows, targets)
    covered = [row for _, part in parts for row in range(part.start, part.stop)]
    assert covered == list(range(rows))
    for target, part in parts:
        assert abs((part.stop - part.start) - rows * target.share / sum(shares)) <= 1

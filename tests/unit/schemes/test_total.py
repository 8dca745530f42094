"""The sum of a gradient's rows, made while it is masked."""

from __future__ import annotations

from math import nan

import pytest
import torch
from in_process import empty, targets

from tempo import kernels
from tempo.keys import KeySchedule
from tempo.schemes import create
from tempo.schemes.base import EncodedGradient, Problem
from tempo.schemes.reply import Tally
from tempo.wire.messages import Linear

ROWS = 600
OUTPUTS = 70

pytestmark = pytest.mark.skipif(kernels.native() is None, reason="only native kernels sum while they write")


def encoded(scheme: str, g: torch.Tensor, wire: torch.dtype = torch.float32, workers: int = 2) -> EncodedGradient:
    keys, everyone = KeySchedule(), targets(*["one"] * workers)
    x, w = torch.randn(len(g), 40), torch.randn(g.shape[1], 40)
    weight = create(scheme).encode_weight(Problem(Linear(), wire), w, keys.fresh(1, "w"), everyone, empty)
    source = weight.encode_input(x, keys.fresh(1, "x"), everyone, empty, lambda: w)
    tallies = {
        o.worker: Tally(torch.randn(4, g.shape[1]), torch.randn(4, len(o.tensors["x"]))) for o in source.operands
    }
    found = source.encode_gradient(g, keys.fresh(1, "g"), empty, lambda: x, lambda: w, want_dw=True, tallies=tallies)
    for o in found.operands if wire == torch.float32 else ():  # what checks asked for is as it was
        tally = tallies[o.worker]
        if tally.columns is not None:
            sums, lengths = tally.columns
            sent = o.tensors["g"].double()
            torch.testing.assert_close(sums.double(), tally.weights.double() @ sent, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(lengths, sent.norm(dim=0), rtol=1e-5, atol=0)
    return found


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("scheme", ["insecure-plain", "tempo", "tempo-signed", "mix"])
def test_it_is_exact_but_for_roundings_in_single_precision(scheme, workers):
    g = torch.randn(ROWS, OUTPUTS) + 1
    total = encoded(scheme, g, workers=workers).total
    exact = g.double().sum(0)
    assert total is not None
    assert ((total - exact).abs() <= 20 * torch.finfo(torch.float32).eps * g.abs().sum(0)).all()


@pytest.mark.parametrize("spoiled", ["a dead row", "two bytes", "not a number"])
def test_where_another_sum_would_be_made_none_is(spoiled):
    g = torch.randn(ROWS, OUTPUTS)
    if spoiled == "a dead row":
        g[5] = 0
    if spoiled == "not a number":
        g[5, 3] = nan
    assert encoded("mix", g, torch.bfloat16 if spoiled == "two bytes" else torch.float32).total is None

"""Sums that are made while a matrix is unmasked are of what was unmasked."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch

from tempo import kernels
from tempo.keys import KeySchedule
from tempo.schemes.masks import Mask, Masks, draw, draw_blocks
from tempo.schemes.reply import MOST_WATCHED, Watch

NATIVE = [name for name in kernels.available() if name != kernels.TORCH]
KINDS = ["none", "scales", "blocks", "two rounds"]


def mask(kind: str, size: int) -> Mask:
    stream = KeySchedule().fresh(0, "mask").stream("mask")
    if kind == "none":
        return Mask()
    if kind == "scales":
        return draw(stream, size, 4)
    return draw_blocks(stream, size, min(7, size), 2 if kind == "two rounds" else 1, 1.0)


def watched(kind: str, x: torch.Tensor, vectors: int = 4) -> tuple[Watch, torch.Tensor]:
    masks = Masks(L=mask(kind, x.shape[0]), P=mask(kind, x.shape[1]))
    watch = Watch.of(torch.randn(vectors, x.shape[1]), len(x))
    out, expected = torch.empty(x.shape), torch.empty(x.shape)
    masks.decode("y", x, [out], watch=watch)
    masks.decode("y", x, [expected])
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    return watch, out


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 200), (50, 33), (9, 4200)], ids=str)
def test_sums_are_those_of_float64(shape, kind, dtype, name):
    x = torch.randn(shape).to(dtype)
    for vectors in (3, MOST_WATCHED):
        with kernels.using(name):
            watch, _ = watched(kind, x, vectors)
        assert watch.seen
        expected, lengths = watch.vectors.double() @ x.double().t(), x.double().norm(dim=1)
        assert (watch.sums - expected).abs().le(1e-5 * shape[1] ** 0.5 * (lengths + 1e-3)).all()
        torch.testing.assert_close(watch.lengths, lengths, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", kernels.available())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoiled", [nan, inf, 1e20, 0.0, 1e-20, "sixteen bits"])
def test_what_cannot_be_summed_is_not_seen(spoiled, kind, name):
    """So that it is read in another way: numbers whose squares leave float32's range, and other dtypes."""
    x = torch.randn(30, 40)
    if spoiled == "sixteen bits":
        x = x.half()
    elif spoiled in (0.0, 1e-20):
        x *= spoiled
    else:
        x[3, 5] = spoiled
    with kernels.using(name):
        watch, _ = watched(kind, x)
    assert not watch.seen

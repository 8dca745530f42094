"""Sums that are made while a matrix is masked or unmasked are of what was read, or written."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch

from tempo import kernels
from tempo.keys import KeySchedule
from tempo.schemes.masks import Mask, Masks, draw, draw_blocks
from tempo.schemes.reply import MOST_WATCHED, Tally, Watch
from tempo.schemes.total import Total

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


def tallied(kind: str, x: torch.Tensor, dtype: torch.dtype, vectors: int, weights: int) -> tuple[Tally, torch.Tensor]:
    masks = Masks(L=mask(kind, x.shape[0]), A=mask(kind, x.shape[1]))
    q = torch.randn(weights, len(x)) if weights else None
    tally = Tally(torch.randn(vectors, x.shape[1]), q)
    out, expected = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape, dtype=dtype)
    masks.encode("x", x, out, tally=tally)
    masks.encode("x", x, expected)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    return tally, out


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 200), (50, 33), (600, 40), (9, 4200)], ids=str)
def test_sums_of_what_is_written_are_of_what_workers_get(shape, kind, dtype, name):
    for vectors, weights in ((4, 0), (8, 4), (MOST_WATCHED, 1)):
        with kernels.using(name):
            tally, out = tallied(kind, torch.randn(shape), dtype, vectors, weights)
        sent = out.double()
        assert tally.rows is not None
        made = [(tally.vectors, sent.t(), tally.rows.sums, tally.rows.lengths)]
        if weights:
            made.append((tally.weights, sent, *tally.columns))
        for factors, matrix, sums, lengths in made:
            exact = matrix.norm(dim=0)
            torch.testing.assert_close(lengths, exact, rtol=1e-5, atol=0)
            off = (sums - factors.double() @ matrix).abs()
            assert (off <= 1e-5 * len(matrix) ** 0.5 * (exact + 1e-3)).all()


@pytest.mark.parametrize("name", kernels.available())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoiled", [nan, inf, 1e20, 0.0, 1e-20])
def test_what_cannot_be_summed_while_it_is_written_is_left_to_others(spoiled, kind, name):
    x = torch.randn(30, 40)
    if spoiled in (0.0, 1e-20):
        x *= spoiled
    else:
        x[3, 5] = spoiled
    with kernels.using(name):
        tally, _ = tallied(kind, x, torch.float32, 4, 4)
    assert tally.rows is None
    assert tally.columns is None


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_maps_are_rows(kind, name):
    masks = Masks(L=mask(kind, 12), A=mask(kind, 20), P=mask(kind, 20))
    x = torch.randn(12, 20, 3, 5).contiguous(memory_format=torch.channels_last)
    tally = Tally(torch.randn(4, 20), torch.randn(4, 180))
    watch, nothing = Watch.of(torch.randn(4, 20), 180), Tally(torch.empty(0, 20))
    with kernels.using(name):
        sent, back = torch.empty_like(x), torch.empty_like(x)
        masks.encode("x", x, sent, tally=tally)
        masks.encode("x", x, sent, tally=nothing)
        masks.decode("y", x, [back], watch=watch)
    assert tally.rows is not None
    assert tally.columns is not None
    assert nothing.rows is not None
    assert watch.seen
    for sums, maps in ((watch, x), (tally.rows, sent), (nothing.rows, sent)):
        pixels = maps.movedim(1, -1).reshape(180, 20)
        torch.testing.assert_close(sums.sums, sums.vectors @ pixels.t(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sums.lengths, pixels.double().norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        tally.columns[0], tally.weights @ sent.movedim(1, -1).reshape(180, 20), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_of_a_gradient_of_maps_is_made_while_it_is_masked(kind):
    masks = Masks(L=mask(kind, 12), P=mask(kind, 20))
    g = torch.randn(12, 20, 3, 5).contiguous(memory_format=torch.channels_last)
    asked = Tally(torch.empty(0, 20), torch.randn(4, 180))
    total, sent = Total(masks, len(g), asked), torch.empty_like(g)
    masks.encode("g", g, sent, tally=total.tally)
    found = total.made()
    if kernels.native() is None:
        assert found is None
        return
    assert found is not None
    torch.testing.assert_close(found, g.sum([0, 2, 3]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        asked.columns[0], asked.weights @ sent.movedim(1, -1).reshape(180, 20), rtol=1e-4, atol=1e-3
    )

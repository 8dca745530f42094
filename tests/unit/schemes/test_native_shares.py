"""The kernels of scheme `split` against PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo import kernels
from tempo.schemes.fixed_point import combine_rows, most_omega, share_rows
from tempo.verify.field import row_sums
from tempo.wire.residues import HALF, SEED_BYTES, P, expand, reduce_

SEEDS = [number.to_bytes(SEED_BYTES, "little") for number in (1137460, 4643994, 3)]
"""Of the first one element 138 is refused, of the second 205: tests/unit/wire/test_residues.py."""
FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[name for name in kernels.available() if name != kernels.TORCH], autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels.using(request.param):
        yield


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def vectors(count: int, columns: int) -> Tensor:
    """Residues, the largest among them."""
    drawn = torch.randint(-HALF, HALF + 1, (count, columns), dtype=torch.int32)
    drawn.view(-1)[:2] = torch.tensor([HALF, -HALF])[: drawn.numel()]
    return drawn


def share(x: Tensor, scales: Tensor | None, omega: float, seeds: list[bytes], v: Tensor | None) -> list[Tensor]:
    """All that `share_rows` gives."""
    out = torch.full(x.shape, 7, dtype=torch.int32)
    steps, sums = share_rows(x, scales, omega, seeds, out, v)
    return [out, steps, torch.zeros(0) if sums is None else sums]


def compare_shares(x: Tensor, scales: Tensor | None, omega: float, seeds: list[bytes], v: Tensor | None) -> None:
    """Bit for bit, but that norms are summed in another order, so that a step may, rarely, be its neighbour."""
    found = share(x, scales, omega, seeds, v)
    with kernels.using(kernels.TORCH):
        expected = share(x, scales, omega, seeds, v)
    torch.testing.assert_close(found[1], expected[1], rtol=2**-23, atol=0)
    same = (found[1] == expected[1]).flatten()
    assert same.sum() >= len(x) - 1
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        if len(one):
            assert torch.equal(one[same], other[same])


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """Of any size and length, rows of zeros and some that no float32 can square among them."""
    count, columns, gap = draw(st.integers(0, 40)), draw(st.integers(1, 90)), draw(st.integers(0, 3))
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    powers = torch.randint(*draw(st.sampled_from([(-2, 3), (-44, 38), (-44, -36), (30, 38)])), (count, 1))
    powers = powers.double()
    whole = torch.randn(count, columns + gap).clamp_(-3, 3).double() * 10**powers * (torch.rand(count, 1) > 0.1)
    return whole.to(draw(st.sampled_from(FLOATS)))[:, :columns]


@settings(max_examples=150, deadline=None)
@given(rows(), st.booleans(), st.floats(0, 1), st.integers(0, 3), st.integers(0, 3))
def test_shares_are_those_of_pytorch(x: Tensor, scaled: bool, weight: float, seeds: int, count: int) -> None:
    columns = x.shape[1]
    scales = torch.rand(columns) / 2 + 0.5 if scaled else None
    omega = weight * most_omega(columns)
    compare_shares(x, scales, omega, SEEDS[:seeds], vectors(count, columns) if count else None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 5000), (2, 2048), (301, 1003), (3000, 1), (1, 1)], ids=str)
def test_shares_of_long_rows_and_of_many(shape: tuple[int, int], dtype: torch.dtype, threads: None) -> None:
    """Longer than what is expanded at a time; parted between threads; refused words in them."""
    x = torch.randn(shape).to(dtype)
    compare_shares(x, torch.rand(shape[1]), 2000.0, SEEDS, vectors(2, shape[1]))


def test_shares_that_are_written_past_the_caches() -> None:
    compare_shares(torch.randn(1025, 4096), None, 5000.0, SEEDS[:1], vectors(2, 4096))


def test_shares_add_up_to_rows() -> None:
    """Within half a step of theirs, but for rounding in float32: the law that both ways of computing obey."""
    x = torch.randn(30, 70)
    out, steps, _ = share(x, None, 1000.0, SEEDS, None)
    total = out.long()
    for seed in SEEDS:
        total += expand(seed, torch.empty(x.shape, dtype=torch.int32))
    assert ((reduce_(total) * steps.double() - x).abs() <= 0.6 * steps).all()


def integers(*shape: int) -> Tensor:
    """Whatever a worker may answer: residues and others, those at the ends of the range among them."""
    drawn = torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32)
    ends = torch.tensor([-(1 << 31) + i for i in range(4)] + [(1 << 31) - 4 + i for i in range(4)] + [0, 1, -1])
    at_end = torch.rand(shape) < 0.3
    return torch.where(at_end, ends[torch.randint(len(ends), shape)].int(), drawn)


def compare_combined(
    parts: list[Tensor],
    steps: Tensor,
    scales: Tensor | None,
    biases: list[Tensor | None],
    outs: list[Tensor],
    v: Tensor | None,
) -> None:
    others = [torch.zeros_like(out) for out in outs]
    sums = combine_rows(parts, steps, scales, biases, outs, v)
    with kernels.using(kernels.TORCH):
        expected = combine_rows(parts, steps, scales, biases, others, v)
    assert (sums is None) is (expected is None)
    if sums is not None and expected is not None:
        assert torch.equal(sums, expected)
    for out, other in zip(outs, others, strict=True):
        assert torch.equal(out, other)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_is_combined_is_that_of_pytorch(data: st.DataObject) -> None:
    """In pieces, with and without biases and scales, gaps between rows, and of parts that say anything."""
    count, widths = data.draw(st.integers(0, 20)), data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=3))
    columns, gap = sum(widths), data.draw(st.integers(0, 3))
    torch.manual_seed(data.draw(st.integers(0, 1 << 30)))
    dtype, scaled = data.draw(st.sampled_from(FLOATS)), data.draw(st.booleans())
    parts = [integers(count, columns + gap)[:, :columns] for _ in range(data.draw(st.sampled_from([1, 2, 3, 4, 16])))]
    biases = [
        torch.randn(w).to(data.draw(st.sampled_from(FLOATS))) if data.draw(st.booleans()) else None for w in widths
    ]
    outs = [torch.full((count, w + gap), 7.0, dtype=dtype)[:, :w] for w in widths]
    steps = torch.rand(count, 1) * 10.0 ** torch.randint(-38, 20, (count, 1))
    v = vectors(vs, columns) if (vs := data.draw(st.integers(0, 3))) else None
    compare_combined(parts, steps, torch.rand(columns) if scaled else None, biases, outs, v)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(2, 5000), (301, 1003), (3000, 1), (1025, 4096)], ids=str)
def test_what_is_combined_of_long_rows_and_many(shape: tuple[int, int], dtype: torch.dtype, threads: None) -> None:
    """Longer than what is staged at a time; parted between threads; written past the caches."""
    parts, steps = [integers(*shape), integers(*shape)], torch.rand(shape[0], 1)
    out = torch.empty(shape, dtype=dtype)
    compare_combined(parts, steps, torch.rand(shape[1]), [torch.randn(shape[1])], [out], vectors(2, shape[1]))


@pytest.mark.parametrize("shape", [(0, 3), (3, 1), (3, 70), (2, 5000), (301, 2003)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_sums_of_integers_are_those_of_pytorch(shape: tuple[int, int], count: int, threads: None) -> None:
    x, v = integers(*shape), vectors(count, shape[1])
    v[:, ::2] = HALF
    sums = row_sums(x, v), row_sums(x.t().contiguous().t(), v)
    with kernels.using(kernels.TORCH):
        expected = row_sums(x, v)
    assert all(torch.equal(found, expected) for found in sums)


def test_what_kernels_are_given_is_checked() -> None:
    """Sizes that do not fit are an error, not memory that is not theirs."""
    native, x, steps = kernels.native(), torch.randn(4, 6), torch.ones(4, 1)
    assert native is not None
    ints, v, sums = torch.zeros(4, 6, dtype=torch.int32), vectors(2, 6), torch.zeros(4, 2, dtype=torch.int64)
    good = [[ints], steps, torch.ones(6), [None], [x], v, sums]
    native.combine(*good)
    for place, bad in [
        (0, []),
        (0, [ints[:3]]),
        (0, [ints] * 17),
        (1, steps[:3]),
        (2, torch.ones(5)),
        (3, [torch.ones(5)]),
        (4, [x[:, :5]]),
        (4, [x.double()]),
        (5, v[:, :5].contiguous()),
        (6, sums[:3]),
        (6, None),
    ]:
        with pytest.raises((ValueError, TypeError)):
            native.combine(*good[:place], bad, *good[place + 1 :])
    if not native.shares():
        return
    good = [x, torch.ones(6), 1e-6, 1e-38, SEEDS[:1], 0, ints, steps, v, sums]
    native.share(*good)
    for place, bad in [
        (0, x.double()),
        (0, x[:, ::2]),
        (1, torch.ones(5)),
        (4, [bytes(31)]),
        (4, SEEDS * 6),
        (5, -1),
        (6, ints[:3]),
        (7, steps[:3]),
        (8, vectors(9, 6)),
        (9, None),
    ]:
        with pytest.raises((ValueError, TypeError)):
            native.share(*good[:place], bad, *good[place + 1 :])


def test_nothing_is_written_that_a_worker_may_not_see_not_even_for_a_moment():
    """Where a word is refused, another secret one stands in for it until the right one takes its place."""
    native, x = kernels.native(), torch.randn(2, 200)
    assert native is not None
    if not native.shares():
        return  # PyTorch writes what is sent once
    out, steps = torch.empty(2, 200, dtype=torch.int32), torch.empty(2, 1)
    refused = native.share(x, None, 1e-9, 2.0**-126, SEEDS[:1], 0, out, steps, None, None)
    ((seed, element, instead),) = refused
    assert (seed, element) == (0, 138)
    rounded = int((x / steps).round().view(-1)[138])
    assert abs(instead) > 1 << 10
    assert int(out.view(-1)[138]) == int(reduce_(torch.tensor(rounded - instead)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_has_a_step_that_is_not(value: float) -> None:
    """And what it is shared as has the sum that it should have: a worker is not blamed for it."""
    x, v = torch.randn(3, 40), vectors(2, 40)
    x[1, 7] = value
    out, steps, sums = share(x, None, 1000.0, SEEDS[:1], v)
    assert steps.isfinite().flatten().tolist() == [True, False, True]
    whole = row_sums(out, v) + row_sums(expand(SEEDS[0], torch.empty_like(out)), v)
    assert not (whole - sums).remainder(P).any()

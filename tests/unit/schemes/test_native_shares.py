"""The kernels of scheme `split` against PyTorch, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo import kernels
from tempo.schemes.fixed_point import most_omega, share_rows
from tempo.wire.residues import HALF, SEED_BYTES, expand, reduce_

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


def compare_shares(
    x: Tensor, scales: Tensor | None, omega: float, seeds: list[bytes], v: Tensor | None
) -> list[Tensor]:
    found = share(x, scales, omega, seeds, v)
    with kernels.using(kernels.TORCH):
        expected = share(x, scales, omega, seeds, v)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    return found


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

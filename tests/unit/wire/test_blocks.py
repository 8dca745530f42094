"""Eight bits per element."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tempo.wire.blocks import BLOCK, pack, packed_size, snap_, unpack

SHAPES = [(), (1,), (31,), (32,), (33,), (4, 64), (7, 5, 3), (100, 2100), (0,), (3, 0)]


def through(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    packed = torch.empty(packed_size(tuple(x.shape)), dtype=torch.uint8)
    pack(x, packed)
    out = torch.empty(x.shape, dtype=dtype)
    unpack(packed, out)
    return out


def per_element(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each element's block."""
    if not x.numel():
        return x
    rows = x.reshape(len(x) if x.dim() > 1 else 1, -1)
    width = rows.shape[1]
    flat = torch.nn.functional.pad(rows, (0, -width % BLOCK)).view(len(rows), -1, BLOCK)
    return flat.abs().amax(2, keepdim=True).expand_as(flat).reshape(len(rows), -1)[:, :width].reshape(x.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_element_is_off_by_more_than_a_128th_of_the_largest_in_its_block(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * torch.logspace(-20, 20, max(1, math.prod(shape)))[: math.prod(shape)].view(shape)
    found = through(x)
    assert bool(((found - x).abs() <= per_element(x) / 128).all())
    width = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    assert packed_size(shape) == x.numel() + (x.numel() // max(width, 1)) * math.ceil(width / 32)


def test_rows_of_other_sizes_do_not_matter() -> None:
    """Masks scale rows by factors that differ widely."""
    x = torch.randn(40, 5)
    scales = 2.0 ** torch.randint(-30, 30, (40, 1))
    assert torch.equal(through(x * scales), through(x) * scales)


def test_the_typical_error_is_a_few_thousandths() -> None:
    """Uniform over a step of 2^k with the largest element in 64 to 128 of them."""
    x = torch.randn(1000, 320)
    error = (through(x) - x).norm() / x.norm()
    assert 0.004 < error < 0.012


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=80))
@example([2.0**-149])
def test_what_was_unpacked_is_packed_into_the_same_bytes(values: list[float]) -> None:
    x = torch.tensor(values)
    once = through(x)
    assert torch.equal(through(once), once)
    assert torch.equal(through(x, torch.bfloat16).float(), once)  # exactly
    assert torch.equal(snap_(x.clone()), once)
    packed, again = (torch.empty(packed_size(tuple(x.shape)), dtype=torch.uint8) for _ in range(2))
    pack(x, packed)
    pack(once, again)
    assert torch.equal(packed, again)


def test_bytes_are_those_of_the_specification() -> None:
    """An element is its integer / 64 times 2^(exponent - 127)."""
    x = torch.zeros(34)
    x[0], x[1], x[2], x[32] = 1.0, -0.5, 0.0078125, 96.0
    packed = torch.empty(packed_size((34,)), dtype=torch.uint8)
    pack(x, packed)
    exponents, integers = packed[:2].tolist(), packed[2:].view(torch.int8).tolist()
    assert exponents == [127, 133]
    assert integers[:4] == [64, -32, 0, 0]
    assert integers[32:] == [96, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_that_is_not_finite_stays_so_and_spoils_no_other(bad: float) -> None:
    x = torch.ones(96)
    x[40] = bad
    found = through(x)
    assert bool(found[32:64].isnan().all())
    assert torch.equal(found[:32], torch.ones(32))
    assert torch.equal(found[64:], torch.ones(32))

"""What adapters add, and products of tall matrices: by every kernel as by PyTorch, within rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo import kernels
from tempo.schemes.fixed_point import combine_rows
from tempo.schemes.low_rank import LowRank, adapter_dtype, times_vectors, weighted_sums

ISAS = pytest.mark.parametrize("isa", kernels.available())
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
SIZES = st.integers(1, 70)


def close(actual, expected, features):
    """Within what sums of so many products of numbers near one are rounded off."""
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6 * features)


@ISAS
@DTYPES
@settings(max_examples=15)
@given(rows=SIZES, columns=st.integers(1, 1100), rank=st.integers(1, 37), offset=st.integers(0, 3))
def test_products_of_a_tall_matrix(isa, dtype, rows, columns, rank, offset):
    generator = torch.Generator().manual_seed(rows * columns + rank)
    wide = torch.randn(rows, columns + offset, generator=generator).to(dtype)
    x, kind = wide[:, offset:], adapter_dtype(dtype)
    vectors = torch.randn(rank, columns, generator=generator, dtype=kind)
    weights = torch.randn(rows, rank + offset, generator=generator, dtype=kind)[:, offset:]
    out = torch.full((rows, rank + 2), torch.nan, dtype=kind)
    with kernels.using(isa):
        times_vectors(x, vectors, out[:, 1:-1])
        sums = weighted_sums(x, weights)
    close(out[:, 1:-1], x.double() @ vectors.double().t(), columns)
    assert out[:, [0, -1]].isnan().all()
    close(sums, weights.double().t() @ x.double(), rows)


@ISAS
def test_rows_on_several_threads_are_the_same_every_time(isa):
    threads = torch.get_num_threads()
    x, weights = torch.randn(1024, 515), torch.randn(1024, 5)
    torch.set_num_threads(3)
    try:
        with kernels.using(isa):
            first, second = weighted_sums(x, weights), weighted_sums(x, weights)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, second)
    close(first, weights.double().t() @ x.double(), 1024)


@ISAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=15)
@given(rows=SIZES, sizes=st.lists(st.integers(1, 70), min_size=1, max_size=3), rank=st.integers(1, 19), data=st.data())
def test_what_is_added_while_answers_are_combined(isa, dtype, rows, sizes, rank, data):
    generator = torch.Generator().manual_seed(rows + sum(sizes))
    whole = torch.randint(-1000, 1000, (rows, sum(sizes)), generator=generator, dtype=torch.int32)
    share = torch.randint(-(1 << 30), 1 << 30, whole.shape, generator=generator, dtype=torch.int32)
    steps, scales = torch.rand(rows, 1, generator=generator), torch.rand(sum(sizes), generator=generator)
    low = torch.randn(rows, rank + 1, generator=generator)[:, 1:]
    added, biases = [], []
    for size in sizes:
        up, bias = torch.randn(rank, size, generator=generator), torch.randn(size, generator=generator)
        added.append(LowRank(low, up) if data.draw(st.booleans()) else None)
        biases.append(bias if data.draw(st.booleans()) else None)
    outs = [torch.empty(rows, size, dtype=dtype) for size in sizes]
    with kernels.using(isa):
        combine_rows([whole - share, share], steps, scales, biases, outs, None, added)
    parts = (whole.double() * steps * scales).split(sizes, 1)
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    for out, part, bias, one in zip(outs, parts, biases, added, strict=True):
        expected = part + (0 if bias is None else bias) + (0 if one is None else one.low.double() @ one.up.double())
        torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=2e-5)

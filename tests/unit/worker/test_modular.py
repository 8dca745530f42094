"""Products mod p are those of Python's integers, whichever way they are computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tempo.wire.messages import Residues
from tempo.wire.residues import HALF, P, reduce_
from tempo.worker.compute import TorchCompute
from tempo.worker.modular import Doubles, Limbs

WAYS = [Doubles, Limbs]
LARGEST = {8: 127, 12: 2047, 15: 16383, 16: 32767}


def product(a: Tensor, b: Tensor) -> Tensor:
    """By integers of any size."""
    whole = a.numpy().astype(object) @ b.numpy().astype(object)
    centred = (np.asarray(whole, dtype=object).reshape(len(a), b.shape[1]) + HALF) % P - HALF
    return torch.from_numpy(centred.astype(np.int32))


def draw(shape: tuple[int, int], largest: int, dtype: torch.dtype, seed: int, ends: bool) -> Tensor:
    """Numbers up to ``largest``, or only these and their negatives."""
    generator = torch.Generator().manual_seed(seed)
    if ends:
        return (torch.randint(0, 2, shape, generator=generator) * 2 - 1).mul(largest).to(dtype)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("bits", LARGEST)
@given(
    t=st.integers(0, 9),
    k=st.integers(0, 300),
    n=st.integers(1, 19),
    seed=st.integers(0, 999),
    ends=st.booleans(),
    transposed=st.booleans(),
)
@example(t=3, k=0, n=1, seed=0, ends=False, transposed=False)
@example(t=1, k=1, n=1, seed=0, ends=True, transposed=True)
@example(t=2, k=8199, n=3, seed=0, ends=True, transposed=True)  # more columns than either way sums at a time
def test_both_ways_give_the_product_of_integers(
    bits: int, t: int, k: int, n: int, seed: int, ends: bool, transposed: bool
) -> None:
    dtype, largest = torch.int8 if bits == 8 else torch.int16, LARGEST[bits]
    a = draw((t, k), HALF, torch.int32, seed, ends)
    b = draw((n, k), largest, dtype, seed + 1, ends).t() if transposed else draw((k, n), largest, dtype, seed + 1, ends)
    expected = product(a, b)
    for way in WAYS:
        if way is Limbs and largest > Limbs.most:
            continue
        out = torch.empty(t, n, dtype=torch.int32)
        way(b, largest).multiply(a, out)
        assert torch.equal(out, expected), way


@pytest.mark.parametrize("value", [HALF, -HALF, 0x7F7F7F7F, 0x7F7F7F80, -(1 << 31), (1 << 31) - 1, 128, -129])
@pytest.mark.parametrize("w", [-128, 127, Limbs.most, -Limbs.most - 1, 128, -129])
def test_ends_of_limbs(value: int, w: int) -> None:
    """Also what is no residue: a worker multiplies what it was sent."""
    dtype = torch.int8 if -128 <= w < 128 else torch.int16
    a, b = torch.full((7, 33), value, dtype=torch.int32), torch.full((33, 5), w, dtype=dtype)
    for way in WAYS:
        out = torch.empty(7, 5, dtype=torch.int32)
        way(b, abs(w)).multiply(a, out)
        assert torch.equal(out, product(a, b)), way


@given(st.lists(st.integers(-(1 << 53) + P, (1 << 53) - P), min_size=1), st.integers(-(1 << 20), 1 << 20))
def test_float64_is_reduced_as_int64_is(values: list[int], multiple: int) -> None:
    near = [multiple * P + edge + d for edge in (-HALF, 0, HALF) for d in (-1, 0, 1)]
    v = torch.tensor(values + near)
    assert torch.equal(reduce_(v.double()).long(), reduce_(v))


@pytest.mark.parametrize("bits", LARGEST)
def test_whatever_is_chosen_gives_the_same_bits(bits: int) -> None:
    """The first call of a size compares both ways, those after it take the faster one."""
    dtype = torch.int8 if bits == 8 else torch.int16
    compute = TorchCompute(torch.device("cpu"))
    for rows in 300, 300, 17, 0:
        w = draw((40, 72), LARGEST[bits], dtype, bits, ends=False)
        x, g = (draw((rows, size), HALF, torch.int32, rows, ends=False) for size in (72, 40))
        y, dx = (torch.empty(rows, size, dtype=torch.int32) for size in (40, 72))
        compute.forward(Residues(), x, w, y)
        compute.input_gradient(Residues(), g, w, dx)
        assert torch.equal(y, product(x, w.t()))
        assert torch.equal(dx, product(g, w))


@pytest.mark.parametrize("wrong", [RuntimeError("no int8 products"), None])
def test_without_exact_int8_products_float64_is_used(
    wrong: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU that has none, or a CPU whose instructions saturate."""

    def saturating(a: Tensor, b: Tensor) -> Tensor:
        if wrong is not None:
            raise wrong
        return (a.int() @ b.int()).clamp(-(1 << 15), (1 << 15) - 1)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    compute = TorchCompute(torch.device("cpu"))
    x, w = draw((9, 64), HALF, torch.int32, 0, ends=True), draw((5, 64), 127, torch.int8, 1, ends=True)
    y = torch.empty(9, 5, dtype=torch.int32)
    compute.forward(Residues(), x, w, y)
    assert torch.equal(y, product(x, w.t()))
    assert "are computed in float64" in caplog.text

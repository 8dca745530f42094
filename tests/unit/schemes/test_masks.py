"""The mask algebra, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempo.keys import KeySchedule
from tempo.schemes.masks import IDENTITY, Form, Gather, Mask, Masks, draw, sandwich

SIZES = st.integers(1, 40)
DOUBLE = torch.float64


def fresh(size: int, groups: int = 1) -> Mask:
    stream = KeySchedule().fresh(1, "test").stream("mask")
    order = torch.from_numpy(stream.permutation(groups)) if groups > 1 else None
    return draw(stream, size, 255, order)


def dense(gather: Gather | None, size: int) -> Tensor:
    if gather is None:
        return torch.eye(size, dtype=DOUBLE)
    matrix = torch.zeros(size, size, dtype=DOUBLE)
    matrix[torch.arange(size), gather.index.long()] = gather.scale
    return matrix


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


@given(SIZES)
def test_the_four_forms_are_what_their_names_say(size):
    mask = fresh(size)
    M = dense(mask.gather(Form.PLAIN), size)
    assert torch.equal(dense(mask.gather(Form.TRANSPOSE), size), M.T)
    assert torch.allclose(dense(mask.gather(Form.INVERSE), size), torch.linalg.inv(M))
    assert torch.allclose(dense(mask.gather(Form.DUAL), size), torch.linalg.inv(M).T)
    for form in Form:
        product = dense(mask.gather(form), size) @ dense(mask.gather(form.undo), size)
        assert torch.allclose(product, torch.eye(size, dtype=DOUBLE))


@given(SIZES, SIZES, st.sampled_from(["x", "w", "y", "g", "dx", "dw"]))
def test_decode_inverts_encode(rows, columns, role):
    masks = Masks(*(fresh({"L": rows, "A": columns, "P": columns}[name]) for name in "LAP"))
    if role in ("w", "dw"):
        masks = Masks(A=fresh(columns), P=fresh(rows))
    plain = torch.randn(rows, columns, dtype=DOUBLE)
    masked, back = torch.empty_like(plain), torch.empty_like(plain)
    masks.encode(role, plain, masked)
    masks.decode(role, masked, back)
    assert relative(back, plain) < 1e-14


@given(SIZES, SIZES, SIZES)
def test_products_of_masked_operands_are_masked_products(rows, inputs, outputs):
    masks = Masks(fresh(rows), fresh(inputs), fresh(outputs))
    x, w = torch.randn(rows, inputs, dtype=DOUBLE), torch.randn(outputs, inputs, dtype=DOUBLE)
    g = torch.randn(rows, outputs, dtype=DOUBLE)
    masked = {role: torch.empty_like(t) for role, t in (("x", x), ("w", w), ("g", g))}
    for role, plain in (("x", x), ("w", w), ("g", g)):
        masks.encode(role, plain, masked[role])
    answers = {
        "y": (masked["x"] @ masked["w"].T, x @ w.T),
        "dx": (masked["g"] @ masked["w"], g @ w),
        "dw": (masked["g"].T @ masked["x"], g.T @ x),
    }
    for role, (answer, plain) in answers.items():
        back = torch.empty_like(plain)
        masks.decode(role, answer, back)
        assert relative(back, plain) < 1e-13


@given(st.integers(2, 30), st.integers(2, 30), st.data())
def test_a_part_can_be_decoded_alone(rows, columns, data):
    start = data.draw(st.integers(0, columns - 1))
    stop = data.draw(st.integers(start + 1, columns))
    for masks in (Masks(fresh(rows), fresh(columns), fresh(columns)), Masks()):
        plain = torch.randn(rows, columns, dtype=DOUBLE)
        masked = torch.empty_like(plain)
        masks.encode("y", plain, masked)
        part = torch.empty(rows, stop - start, dtype=DOUBLE)
        masks.decode("y", masked, part, cols=slice(start, stop))
        assert relative(part, plain[:, start:stop]) < 1e-14


@given(st.integers(2, 5), st.integers(1, 4))
def test_grouped_channels_stay_within_their_group(groups, width):
    mask = fresh(groups * width, groups)
    source = mask.permutation.long().view(groups, width) // width
    assert (source == source[:, :1]).all()
    assert sorted(source[:, 0].tolist()) == list(range(groups))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4), (1, 1)])
def test_empty_and_tiny_tensors(shape):
    x = torch.randn(shape, dtype=DOUBLE)
    out = torch.empty_like(x)
    rows, columns = (fresh(size).gather(Form.PLAIN) if size else None for size in shape[:2])
    sandwich(x, rows, columns, out)
    assert torch.isfinite(out).all()
    assert out.count_nonzero() == x.numel()


@given(st.integers(1, 20), st.integers(1, 20))
def test_values_are_rounded_once_into_the_wire_dtype(rows, columns):
    masks = Masks(fresh(rows), fresh(columns))
    x = torch.randn(rows, columns)
    wide, narrow = torch.empty(rows, columns), torch.empty(rows, columns, dtype=torch.bfloat16)
    masks.encode("x", x, wide)
    masks.encode("x", x, narrow)
    assert torch.equal(wide.to(torch.bfloat16), narrow)


def test_noncontiguous_inputs_give_the_same():
    masks = Masks(fresh(6), fresh(4))
    x = torch.randn(4, 6, dtype=DOUBLE).T
    a, b = torch.empty(6, 4, dtype=DOUBLE), torch.empty(6, 4, dtype=DOUBLE)
    masks.encode("x", x, a)
    masks.encode("x", x.contiguous(), b)
    assert torch.equal(a, b)


def test_identity_copies():
    x = torch.randn(3, 4)
    out = torch.empty(3, 4)
    Masks(IDENTITY, IDENTITY).encode("x", x, out)
    assert torch.equal(out, x)


def test_scales_are_positive_integers_over_the_whole_range():
    scale = fresh(20_000).scale
    assert torch.equal(scale, scale.round())
    assert scale.min() == 1
    assert scale.max() == 255

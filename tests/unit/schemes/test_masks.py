"""The mask algebra, against dense matrices."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo.keys import KeySchedule
from tempo.schemes.block_sandwich import block_sandwich
from tempo.schemes.masks import IDENTITY, Form, Mask, Masks, draw, draw_blocks
from tempo.schemes.operators import Operator
from tempo.schemes.sandwich import sandwich

SIZES = st.integers(1, 40)
DOUBLE = torch.float64
UNHURRIED = settings(deadline=None)  # the machine is shared


KINDS = st.sampled_from(["permutation", "orthogonal", "general", "two rounds"])


def fresh(size: int, groups: int = 1, kind: str = "permutation") -> Mask:
    stream = KeySchedule().fresh(1, "test").stream("mask")
    order = torch.from_numpy(stream.permutation(groups)) if groups > 1 else None
    if kind == "permutation":
        return draw(stream, size, 255, order)
    block = min(3, size // groups)
    return draw_blocks(stream, size, block, 2 if kind == "two rounds" else 1, 4.0 if kind == "general" else 1.0, order)


def dense(operator: Operator | None, size: int) -> Tensor:
    """By its definition, stage by stage."""
    matrix = torch.eye(size, dtype=DOUBLE)
    if operator is None:
        return matrix
    for number, gather in enumerate(operator.steps.gathers):
        if number:
            batches = operator.steps.blocks[number - 1].batches
            matrix = torch.block_diag(*(block for batch in batches for block in batch)) @ matrix
        stage = torch.zeros(size, size, dtype=DOUBLE)
        stage[torch.arange(size), gather.index.long()] = 1.0 if gather.scale is None else gather.scale
        matrix = stage @ matrix
    return matrix


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


@UNHURRIED
@given(SIZES, KINDS)
def test_the_four_forms_are_what_their_names_say(size, kind):
    mask = fresh(size, kind=kind)
    M = dense(mask.operator(Form.PLAIN), size)
    assert torch.allclose(dense(mask.operator(Form.TRANSPOSE), size), M.T)
    assert torch.allclose(dense(mask.operator(Form.INVERSE), size), torch.linalg.inv(M))
    assert torch.allclose(dense(mask.operator(Form.DUAL), size), torch.linalg.inv(M).T)
    for form in Form:
        product = dense(mask.operator(form), size) @ dense(mask.operator(form.undo), size)
        assert torch.allclose(product, torch.eye(size, dtype=DOUBLE))


@UNHURRIED
@given(SIZES, SIZES, KINDS, st.sampled_from([(), (3,), (2, 3)]), st.sampled_from(list(Form)))
def test_both_sides_of_a_sandwich_are_the_matrices(rows, columns, kind, spatial, form):
    left, right = fresh(rows, kind=kind).operator(form), fresh(columns, kind=kind).operator(form)
    x = torch.randn(rows, columns, *spatial, dtype=DOUBLE)
    for row, column in ((left, right), (left, None), (None, right)):
        out = torch.empty_like(x)
        sandwich(x, row, column, [out])
        assert relative(out, torch.einsum("ir,jc,rc...->ij...", dense(row, rows), dense(column, columns), x)) < 1e-13


@UNHURRIED
@given(SIZES, SIZES, KINDS, KINDS, st.sampled_from([(), (3,)]))
def test_the_two_sides_may_be_of_different_kinds(rows, columns, left_kind, right_kind, spatial):
    left, right = (
        fresh(size, kind=kind).operator(Form.DUAL) for size, kind in ((rows, left_kind), (columns, right_kind))
    )
    x = torch.randn(rows, columns, *spatial, dtype=DOUBLE)
    out = torch.empty_like(x)
    sandwich(x, left, right, [out])
    assert relative(out, torch.einsum("ir,jc,rc...->ij...", dense(left, rows), dense(right, columns), x)) < 1e-13


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize(("sides", "spatial"), [("both", ()), ("rows", ()), ("columns", ()), ("both", (30,))])
def test_tensors_of_many_chunks(rounds, sides, spatial, monkeypatch):
    rows, columns, rows_at_a_time = 300, 110, 100
    monkeypatch.setattr("tempo.schemes.block_sandwich._CHUNK", rows_at_a_time * columns * prod(spatial))
    left, right = (
        draw_blocks(KeySchedule().fresh(1, "test").stream("mask"), size, 32, rounds, 1.0).operator(Form.PLAIN)
        if sides in (side, "both")
        else None
        for side, size in (("rows", rows), ("columns", columns))
    )
    x = torch.randn(rows, columns, *spatial, dtype=DOUBLE)
    pieces = [torch.empty(rows, size, *spatial, dtype=DOUBLE) for size in (columns - 30, 30)]
    block_sandwich(x, left and left.steps, right and right.steps, pieces)
    half = torch.einsum("ir,rc...->ic...", dense(left, rows), x)
    expected = torch.einsum("jc,ic...->ij...", dense(right, columns), half)
    assert relative(torch.cat(pieces, 1), expected) < 1e-13


@UNHURRIED
@given(SIZES, SIZES, KINDS, st.sampled_from(["x", "w", "y", "g", "dx", "dw"]))
def test_decode_inverts_encode(rows, columns, kind, role):
    masks = Masks(*(fresh({"L": rows, "A": columns, "P": columns}[name], kind=kind) for name in "LAP"))
    if role in ("w", "dw"):
        masks = Masks(A=fresh(columns, kind=kind), P=fresh(rows, kind=kind))
    plain = torch.randn(rows, columns, dtype=DOUBLE)
    masked, back = torch.empty_like(plain), torch.empty_like(plain)
    masks.encode(role, plain, masked)
    masks.decode(role, masked, [back])
    assert relative(back, plain) < 1e-13


@UNHURRIED
@given(SIZES, SIZES, SIZES, KINDS)
def test_products_of_masked_operands_are_masked_products(rows, inputs, outputs, kind):
    masks = Masks(fresh(rows, kind=kind), fresh(inputs, kind=kind), fresh(outputs, kind=kind))
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
    # Relative to the operands: a product of few elements may cancel almost to zero.
    norms = {"y": x.norm() * w.norm(), "dx": g.norm() * w.norm(), "dw": g.norm() * x.norm()}
    for role, (answer, plain) in answers.items():
        back = torch.empty_like(plain)
        masks.decode(role, answer, [back])
        assert (back - plain).norm() <= 1e-13 * norms[role]


@UNHURRIED
@given(st.integers(2, 30), st.lists(st.integers(1, 10), min_size=2, max_size=4), KINDS)
def test_pieces_by_output_features_are_decoded_into_place(rows, sizes, kind):
    features = sum(sizes)
    for role, shape, axis in (("y", (rows, features), 1), ("dw", (features, rows), 0)):
        for masks in (Masks(*(fresh(size, kind=kind) for size in (rows, rows, features))), Masks()):
            plain = torch.randn(shape, dtype=DOUBLE)
            masked = torch.empty_like(plain)
            masks.encode(role, plain, masked)
            pieces = [torch.empty_like(piece) for piece in plain.split(sizes, axis)]
            masks.decode(role, masked, pieces)
            assert relative(torch.cat(pieces, axis), plain) < 1e-13


@UNHURRIED
@given(st.integers(2, 5), st.integers(1, 4))
def test_grouped_channels_stay_within_their_group(groups, width):
    mask = fresh(groups * width, groups)
    source = mask.gathers[0].index.long().view(groups, width) // width
    assert (source == source[:, :1]).all()
    assert sorted(source[:, 0].tolist()) == list(range(groups))


@UNHURRIED
@given(st.integers(2, 4), st.integers(1, 8), st.integers(1, 8), KINDS)
def test_grouped_convolutions_of_masked_operands_are_masked_convolutions(groups, inputs, outputs, kind):
    stream = KeySchedule().fresh(1, "test").stream("order")
    order = torch.from_numpy(stream.permutation(groups))

    def grouped(width: int) -> Mask:
        own = KeySchedule().fresh(1, "test").stream("mask")
        if kind == "permutation":
            return draw(own, groups * width, 255, order)
        return draw_blocks(own, groups * width, min(3, width), 2 if kind == "two rounds" else 1, 2.0, order)

    masks = Masks(fresh(5, kind=kind), grouped(inputs), grouped(outputs))
    x = torch.randn(5, groups * inputs, 6, dtype=DOUBLE)
    w = torch.randn(groups * outputs, inputs, 3, dtype=DOUBLE)
    x_masked, w_masked = torch.empty_like(x), torch.empty_like(w)
    masks.encode("x", x, x_masked)
    masks.encode("w", w, w_masked)
    y = torch.conv1d(x, w, groups=groups)
    back = torch.empty_like(y)
    masks.decode("y", torch.conv1d(x_masked, w_masked, groups=groups), [back])
    assert (back - y).norm() <= 1e-13 * x.norm() * w.norm()
    dw_masked, dw = torch.empty_like(w), torch.empty_like(w)
    masks.encode("dw", w, dw_masked)
    masks.decode("dw", dw_masked, [dw])
    assert relative(dw, w) < 1e-13


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4), (1, 1)])
def test_empty_and_tiny_tensors(shape):
    x = torch.randn(shape, dtype=DOUBLE)
    out = torch.empty_like(x)
    rows, columns = (fresh(size).operator(Form.PLAIN) if size else None for size in shape[:2])
    sandwich(x, rows, columns, [out])
    assert torch.isfinite(out).all()
    assert out.count_nonzero() == x.numel()


@UNHURRIED
@given(st.integers(1, 20), st.integers(1, 20), KINDS)
def test_values_are_rounded_once_into_the_wire_dtype(rows, columns, kind):
    masks = Masks(fresh(rows, kind=kind), fresh(columns, kind=kind))
    x = torch.randn(rows, columns)
    wide, narrow = torch.empty(rows, columns), torch.empty(rows, columns, dtype=torch.bfloat16)
    masks.encode("x", x, wide)
    masks.encode("x", x, narrow)
    assert torch.equal(wide.to(torch.bfloat16), narrow)
    # And the way back starts from the rounded values.
    back, expected = torch.empty(rows, columns), torch.empty(rows, columns)
    masks.decode("dx", narrow, [back])
    masks.decode("dx", narrow.float(), [expected])
    assert torch.equal(back, expected)


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
    scale = fresh(20_000).gathers[0].scale
    assert torch.equal(scale, scale.round())
    assert scale.min() == 1
    assert scale.max() == 255

"""The kernels against the same operators in double precision, which go through PyTorch."""

import pytest
import torch

from tempo import kernels
from tempo.keys import KeySchedule
from tempo.schemes.low_rank import LowRank
from tempo.schemes.masks import Form, Mask, draw, draw_blocks
from tempo.schemes.operators import Gather
from tempo.schemes.sandwich import sandwich

KINDS = {
    "none": lambda stream, size: None,
    "permutation": lambda stream, size: draw(stream, size, 255),
    "blocks": lambda stream, size: draw_blocks(stream, size, min(32, size), 1, 1.0),
    "one block": lambda stream, size: draw_blocks(stream, size, size, 1, 1.0),
    "two rounds": lambda stream, size: draw_blocks(stream, size, min(16, size), 2, 4.0),
}
SHAPES = [(1, 1), (7, 5), (16, 64), (97, 130)]
"""Around the widths of vectors, cache lines, chunks and tiles."""


@pytest.fixture(params=[name for name in kernels.available() if name != kernels.TORCH])
def kernel(request, monkeypatch):
    """One instruction set; and PyTorch not at all for single precision."""

    def forbidden(x, *others):
        assert x.dtype == torch.float64, "went through PyTorch"
        return in_torch(x, *others)

    from tempo.schemes import sandwich as module

    in_torch = module._in_torch
    monkeypatch.setattr(module, "_in_torch", forbidden)
    with kernels.using(request.param):
        yield request.param


def mask(kind: str, size: int) -> Mask | None:
    return KINDS[kind](KeySchedule().fresh(1, "test").stream("mask"), size)


def operators(left: str, right: str, shape: tuple[int, ...], form: Form):
    made = mask(left, shape[0]), mask(right, shape[1])
    return [None if found is None else found.operator(form) for found in made]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("right", KINDS)
@pytest.mark.parametrize("left", KINDS)
def test_every_pair_of_operators_is_what_it_is_in_double_precision(kernel, left, right, shape):
    x = torch.randn(shape)
    for form in Form:
        rows, columns = operators(left, right, shape, form)
        exact, out = torch.empty(shape, dtype=torch.float64), torch.empty(shape)
        sandwich(x.double(), rows, columns, [exact])
        sandwich(x, rows, columns, [out])
        assert (out - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("shape", [(45, 4100), (1025, 512)], ids=str)
@pytest.mark.parametrize("kind", ["none", "permutation", "blocks"])
def test_rows_wider_than_the_caches_and_outputs_written_past_them(kernel, kind, shape):
    rows, columns = operators(kind, kind, shape, Form.PLAIN)
    x = torch.randn(shape)
    exact, out = torch.empty(shape, dtype=torch.float64), torch.empty(shape)
    sandwich(x.double(), rows, columns, [exact])
    sandwich(x, rows, columns, [out])
    assert (out - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_pieces_biases_and_strides(kernel, left, right):
    shape = (40, 75)
    rows, columns = operators(left, right, shape, Form.DUAL)
    x = torch.randn(40, 80)[:, 3:78]
    whole = torch.empty(shape)
    sandwich(x, rows, columns, [whole])
    room = torch.full((40, 100), 7.0)
    for axis, sizes in ((1, (16, 33, 26)), (0, (3, 37))):
        outs = room[:, :75].split(sizes, axis)
        sandwich(x, rows, columns, outs, axis)
        assert torch.equal(torch.cat(outs, axis), whole)
    assert (room[:, 75:] == 7.0).all()
    biases = [torch.randn(16), None, torch.randn(26)]
    outs = [torch.empty(40, size) for size in (16, 33, 26)]
    sandwich(x, rows, columns, outs, 1, biases)
    for out, piece, bias in zip(outs, whole.split((16, 33, 26), 1), biases, strict=True):
        torch.testing.assert_close(out, piece if bias is None else piece + bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_low_rank_is_added_on_the_way(kernel, shape, dtype, kind):
    rows, columns = operators(kind, kind, shape, Form.PLAIN)
    x = torch.randn(shape)
    for rank in (1, 16, 19):
        left, right = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
        sizes = (shape[1] // 3, shape[1] - shape[1] // 3)
        biases = [torch.randn(sizes[0]), None]
        expected = [torch.empty(shape[0], size, dtype=torch.float64) for size in sizes]
        outs = [torch.empty(shape[0], size, dtype=dtype) for size in sizes]
        sandwich(x.double(), rows, columns, expected, 1, biases, plus=LowRank(left.double(), right.double()))
        sandwich(x, rows, columns, outs, 1, biases, plus=LowRank(left, right))
        peak = float(torch.cat(expected, 1).abs().max() + (left.abs() @ right.abs()).max())  # of what may cancel
        for out, exact in zip(outs, expected, strict=True):
            assert ((out - exact).abs() <= 2e-6 * peak + torch.finfo(dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_bfloat16_is_rounded_once_and_to_even(kernel, left, right):
    shape = (35, 70)
    rows, columns = operators(left, right, shape, Form.PLAIN)
    x = torch.randn(shape).bfloat16()
    wide, narrow = torch.empty(shape), torch.empty(shape, dtype=torch.bfloat16)
    sandwich(x, rows, columns, [wide])
    sandwich(x, rows, columns, [narrow])
    assert torch.equal(narrow, wide.bfloat16())
    exact = torch.empty(shape)
    sandwich(x.float(), rows, columns, [exact])
    assert torch.equal(wide, exact)


def test_numbers_that_are_not_finite_survive(kernel):
    x = torch.tensor([[float("nan"), float("inf")], [-float("inf"), 1e38]])
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(2, 2, dtype=dtype)
        sandwich(x, None, None, [out])
        torch.testing.assert_close(out, x.to(dtype), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_lie_side_by_side(kernel, kind):
    shape = (34, 40, 3, 5)
    rows, columns = operators(kind, kind, shape, Form.INVERSE)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    exact = torch.empty(shape, dtype=torch.float64)
    sandwich(x.double(), rows, columns, [exact])
    out = torch.empty(shape).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(40)
    sandwich(x, rows, columns, [out], 1, [bias])
    exact += bias.double().view(-1, 1, 1)
    assert (out - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("left", ["none", "permutation", "blocks"])
@pytest.mark.parametrize("right", ["none", "permutation", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_that_lie_first(kernel, left, right, dtype):
    if left == right == "none":
        return  # a copy
    shape = (34, 40, 3, 3)
    rows, columns = operators(left, right, shape, Form.INVERSE)
    x = torch.randn(shape)
    exact = torch.empty(shape, dtype=torch.float64)
    sandwich(x.double(), rows, columns, [exact])
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    for axis, sizes in ((1, (40,)), (1, (16, 24)), (0, (10, 24))):
        outs = [part.clone() for part in torch.empty(shape, dtype=dtype).split(sizes, axis)]
        biases = [torch.randn(sizes[0]), None][: len(sizes)] if axis == 1 else [None, None]
        sandwich(x, rows, columns, outs, axis, biases)
        for out, piece, bias in zip(outs, exact.split(sizes, axis), biases, strict=True):
            expected = piece if bias is None else piece + bias.double().view(-1, 1, 1)
            assert (out - expected).abs().max() <= tolerance * expected.abs().max()


def test_groups_as_many_as_taps_are_no_matrix():
    shape, channels = (18, 4, 3, 3), 36
    rows, columns = (mask("permutation", size) for size in (18, channels))
    order = torch.arange(9).repeat_interleave(4) * 4 + torch.arange(4).repeat(9).roll(1)
    rows, columns = (
        rows.operator(Form.PLAIN),
        Mask((Gather(order.int(), columns.gathers[0].scale),)).operator(Form.PLAIN),
    )
    x, out, exact = torch.randn(shape), torch.empty(shape), torch.empty(shape, dtype=torch.float64)
    sandwich(x.double(), rows, columns, [exact])
    sandwich(x, rows, columns, [out])
    torch.testing.assert_close(out.double(), exact)


def test_what_is_not_an_operator_is_refused():
    native = kernels.native()
    if native is None:
        pytest.skip("no native kernels are installed")
    x, out = torch.randn(4, 3), torch.empty(4, 3)
    fine, square = torch.arange(4, dtype=torch.int32), [[torch.ones(1, 4, 4)]]
    for gathers, scale, blocks, inverses in (
        ([torch.tensor([0, 1, 2, 4], dtype=torch.int32)], None, [], []),
        ([torch.tensor([0, 1, 2, -1], dtype=torch.int32)], None, [], []),
        ([torch.tensor([0, 1, 1, 2], dtype=torch.int32)], None, [], []),
        ([], None, [], []),
        ([fine], torch.ones(3).double(), [], []),
        ([fine, fine], torch.ones(4).double(), square, square),
        ([fine], None, square, square),
        ([fine, fine], None, square, []),
        ([fine, fine[:3]], None, square, square),
        ([fine, fine], None, [[torch.ones(1, 3, 3)]], square),
        ([fine, fine], None, square, [[torch.ones(1, 4, 3)]]),
    ):
        with pytest.raises(ValueError):
            native.Mask(gathers, scale, blocks, inverses)
    for size, form in ((4, 4), (4, -1), (3, 0), (2, 0), (1, 0), (0, 0)):
        with pytest.raises(ValueError):
            native.sandwich(x, (native.Mask([fine[:size]], None, [], []), form), None, [out], 1, [None])
    with pytest.raises(ValueError):
        native.sandwich(x, (None, 0), None, [out], 1, [None])
    for plus in (
        (torch.ones(3, 2), torch.ones(2, 3)),
        (torch.ones(4, 2), torch.ones(3, 3)),
        (torch.ones(4, 2), torch.ones(2, 4)),
    ):
        with pytest.raises(ValueError):
            native.sandwich(x, None, None, [out], 1, [None], None, plus)
    for outs, axis in (([out[:3]], 1), ([out[:, :2]], 1), ([out, out], 0), ([], 1), ([out.expand(2, 4, 3)], 1)):
        with pytest.raises(ValueError):
            native.sandwich(x, None, None, outs, axis, [None] * len(outs))

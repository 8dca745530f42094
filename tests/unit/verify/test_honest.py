"""Honest answers pass, whatever is multiplied."""

from __future__ import annotations

from math import nan

import pytest
import torch
from answering import ANSWERS, DTYPES, KINDS, LINEAR, Exchange, exchange, exchanges, rows
from hypothesis import given, settings
from torch import Tensor

from tempo import kernels
from tempo.keys import KeySchedule
from tempo.schemes.masks import Masks, draw
from tempo.verify.checks import WeightCheck
from tempo.wire.messages import Conv, Linear


@settings(max_examples=150, deadline=None)
@given(exchanges())
def test_honest_answers_pass(sent: Exchange):
    for name, found in sent.judge(**sent.answers).items():
        assert found.passed, (name, found)
        assert found.unchecked == 0


@pytest.mark.skipif(kernels.native() is None, reason="only native kernels sum while they write")
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_a_weight_may_be_summed_while_it_is_masked(dtype):
    w, keys = torch.randn(48, 64), KeySchedule()
    masks = Masks(P=draw(keys.fresh(0, "p").stream("p"), 48, 9), A=draw(keys.fresh(0, "a").stream("a"), 64, 9))
    key, w_masked = keys.fresh(0, "w"), torch.full((48, 64), nan, dtype=dtype)
    check = WeightCheck(Linear(), w_masked, key, written=False)
    tally = check.tally()
    masks.encode("w", w, w_masked, tally=tally)
    assert tally.rows is not None
    check.sent(w_masked, tally)
    read = WeightCheck(Linear(), w_masked, key)
    for made, expected in ((check.from_outputs, read.from_outputs), (check.from_inputs, read.from_inputs)):
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5 * float(w_masked.norm()))
    torch.testing.assert_close(check.length, read.length, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_checked(kind):
    sent = exchange(*KINDS[kind])
    groups = getattr(sent.product, "groups", 1)
    for name, found in sent.judge(**sent.answers).items():
        assert found.rows == rows(sent.answers[name], name) * (1 if name == "dw" else groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scale_does_not_matter(kind, dtype):
    """Operands from 1e-20 to 1e20, as long as their products are numbers of float32."""
    exponents = [(20, 0, 0), (0, 20, 0), (0, 0, 20), (20, -20, 10), (-20, 20, -10), (10, 20, -20), (15, 15, 15)]
    for signs in (1, -1):
        for powers in exponents:
            sent = exchange(*KINDS[kind], dtype).scaled(*(10.0 ** (signs * power) for power in powers))
            answers = sent.answers
            for name, found in sent.judge(**answers).items():
                assert found.passed, (name, powers, found)
                assert found.unchecked == 0
            for name, found in sent.judge(**{name: answer * 4 for name, answer in answers.items()}).items():
                assert not found.passed, (name, powers, found)


def shaped(kind: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Numbers that are hard on sums."""
    z = torch.randn(shape, generator=generator)
    return {
        "constant": torch.full(shape, 0.1),
        "positive": z.abs() + 3,
        "rectified": z.relu(),
        "sixteen decades": z * 10 ** (16 * torch.rand(shape, generator=generator) - 8),
        "one large row": torch.cat([1e6 * z[:1], z[1:]]),
        "one large feature": torch.cat([1e6 * z[:, :1], z[:, 1:]], 1),
        "cancelling": z.abs()
        * torch.where(torch.arange(shape[1]) % 2 == 0, 1.0, -1.0).view(-1, *[1] * (len(shape) - 2)),
    }[kind]


HARD = ["constant", "positive", "rectified", "sixteen decades", "one large row", "one large feature", "cancelling"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", HARD)
def test_numbers_that_are_hard_on_sums(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    for product, x, w in (*KINDS.values(), (Linear(), (200, 1500), (30, 1500))):
        sent = exchange(product, x, w)
        parts = [shaped(kind, t.shape, generator) for t in (sent.x, sent.w, sent.g)]
        if dtype == torch.float16 and ("large" in kind or "decades" in kind):
            parts = [part * 1e-4 for part in parts]  # what fits its range; most of it is subnormal
        sent = Exchange(product, *(part.to(dtype) for part in parts))
        for name, found in sent.judge(**sent.answers).items():
            assert found.passed, (name, product, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_that_all_point_one_way(dtype):
    """Long sums of equal numbers."""
    for x, w in (((8, 20_000), (6, 20_000)), ((20_000, 8), (6, 8))):
        for value in (0.1, 0.7, 1 / 3, 0.01):
            sent = Exchange(Linear(), *(torch.full(s, value).to(dtype) for s in (x, w, (x[0], w[0]))))
            for name, found in sent.judge(**sent.answers).items():
                assert found.passed, (name, x, found)


def test_a_convolution_by_fourier_transforms():
    """As a GPU may compute it: errors then reach pixels around which there is nothing to sum."""
    sent = exchange(Conv((1, 1), (1, 1), (1, 1), 1), (20, 16, 16, 16), (16, 16, 3, 3))
    sent.x[:, :, 4:] = 0
    size = (18, 18)
    of_x, of_w = torch.fft.rfft2(sent.x, size), torch.fft.rfft2(sent.w.flip(2, 3), size)
    y = torch.fft.irfft2(torch.einsum("nchw,ochw->nohw", of_x, of_w), size)[:, :, 1:17, 1:17]
    assert y[:, :, 8:].abs().max() > 0
    for answer in (y, sent.answers["y"]):
        found = sent.judge(y=answer)["y"]
        assert found.passed, found


@pytest.mark.parametrize("shapes", [((0, 5), (3, 5)), ((0, 4, 6, 6), (2, 4, 3, 3))], ids=["linear", "convolution"])
def test_no_rows(shapes):
    product = Linear() if len(shapes[0]) == 2 else Conv((1, 1), (0, 0), (1, 1), 1)
    sent = exchange(product, *shapes)
    found = sent.judge(**sent.answers)
    assert found["y"].rows == found["dx"].rows == 0
    assert all(residual.passed for residual in found.values())
    lie = torch.full_like(sent.w, 1e-20)
    assert not sent.judge(dw=lie)["dw"].passed  # of no rows, a weight gradient is zero


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_have_no_tolerance(kind, dtype):
    sent = exchange(*KINDS[kind], dtype)
    for operand, touched in (("x", ["y", "dw"]), ("w", ["y", "dx"]), ("g", ["dx", "dw"])):
        zero = Exchange(sent.product, **{n: getattr(sent, n) * (n != operand) for n in ("x", "w", "g")})
        answers = zero.answers
        assert all(found.passed for found in zero.judge(**answers).values())
        for name in touched:
            lie = answers[name].clone()
            lie[(-1,) * lie.dim()] = 1e-3
            assert not zero.judge(**{name: lie})[name].passed


def test_a_zero_row_among_others_has_no_tolerance():
    sent = exchange(*LINEAR)
    sent.x[7] = 0
    sent.g[9] = 0
    for name, row in (("y", 7), ("dx", 9)):
        lie = sent.answers[name]
        lie[row, 3] = 1e-12
        found = sent.judge(**{name: lie})[name]
        assert not found.passed
        assert found.row == (row,)


def test_answers_may_travel_in_another_dtype():
    for operands, travels in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        sent = exchange(*LINEAR, operands)
        answers = {name: answer.to(travels) for name, answer in sent.answers.items()}
        assert all(found.passed for found in sent.judge(**answers).values())
        assert set(answers) == set(ANSWERS)

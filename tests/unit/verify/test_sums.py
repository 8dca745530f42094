"""Sums of rows and columns are the same with every instruction set, and what is judged is what is used."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from answering import DTYPES, KINDS, LINEAR, Exchange, exchange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo import kernels
from tempo.keys import KeySchedule
from tempo.verify.checks import Residual, WeightCheck
from tempo.verify.sums import Sums, of_both, of_rows

FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture(params=kernels.available(), autouse=True)
def instructions(request):
    with kernels.using(request.param):
        yield request.param


def compare(found: Sums, x: Tensor, v: Tensor) -> None:
    """With sums in float64; errors relative to what may be lost."""
    x, v = x.double(), v.double()
    lengths = x.norm(dim=1)
    bound = 1e-6 * (x.shape[1] + 8) ** 0.5 * v.norm(dim=1).unsqueeze(1) * lengths
    assert (found.sums.double() - v @ x.t()).abs().le(bound + 1e-30).all()
    assert found.lengths.dtype == torch.float64
    torch.testing.assert_close(found.lengths, lengths, rtol=1e-5, atol=1e-16)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Any sizes, with gaps between rows or without."""
    rows, columns, gap = draw(st.integers(0, 70)), draw(st.integers(1, 90)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    whole = torch.randn(rows, columns + gap, generator=generator)
    return whole.to(draw(st.sampled_from(DTYPES)))[:, :columns]


@settings(max_examples=60, deadline=None)
@given(matrices(), st.integers(0, 9), st.integers(0, 9))
def test_sums_are_those_of_float64(x, vectors, weights):
    work = torch.promote_types(x.dtype, torch.float32)
    v, q = torch.randn(vectors, x.shape[1], dtype=work), torch.randn(weights, len(x), dtype=work)
    compare(of_rows(x, v), x, v)
    rows, columns = of_both(x, v, q)
    compare(rows, x, v)
    compare(columns, x.t(), q)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_rows(dtype):
    """More than columns are summed in float32 over."""
    x, v, q = torch.randn(1500, 40).to(dtype), torch.randn(4, 40), torch.randn(4, 1500)
    rows, columns = of_both(x, v, q)
    compare(rows, x, v)
    compare(columns, x.t(), q)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("power", [-37, -25, -20, 18, 25, 36])
def test_lengths_whose_squares_leave_the_range_of_float32(power, dtype):
    x = (torch.randn(600, 60) * 10.0**power).to(dtype)
    x[:300] *= 10 if power < 0 else 0.1
    x[7], x[:, 9] = 0, 0
    rows, columns = of_both(x, torch.zeros(1, 60), torch.zeros(1, 600))
    lengths = (x.double().norm(dim=dim) for dim in (1, 0))
    for found, length, count in zip((rows, columns), lengths, (60, 600), strict=True):
        lost = (count * torch.finfo(torch.float32).tiny) ** 0.5
        assert found.lengths.ge(length * (1 - 1e-5)).all()
        assert found.lengths.le(length * (1 + 1e-5) + lost).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_what_is_not_finite_shows_in_its_row_and_column_alone(value, dtype):
    x = torch.randn(300, 50).to(dtype)
    x[270, 33] = value
    rows, columns = of_both(x, torch.randn(3, 50), torch.randn(3, 300))
    for found, place in ((rows, 270), (columns, 33)):
        assert not found.sums[:, place].isfinite().any()
        assert not found.lengths[place].isfinite()
        others = torch.arange(len(found.lengths)) != place
        assert found.sums[:, others].isfinite().all()
        assert found.lengths[others].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_is_made_on_the_way(dtype):
    x = torch.randn(100, 30).to(dtype)
    v = torch.randn(4, 30, dtype=torch.promote_types(dtype, torch.float32))
    into = torch.zeros_like(x)
    found = of_rows(x, v, into=into)
    assert torch.equal(into, x)
    compare(found, into, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honest_answers_pass_and_lies_do_not(dtype):
    sent = exchange(*LINEAR, dtype)
    for name, answer in sent.answers.items():
        assert sent.judge(**{name: answer})[name].passed
        lie = answer.clone()
        lie[-1, -1] += 30 * answer.abs().max()
        found = sent.judge(**{name: lie})[name]
        assert not found.passed
        assert found.row == (len(lie) - 1,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_hard_on_sums(dtype):
    """Long sums of equal ones; widely scaled ones."""
    x, w = (12, 5000), (6, 5000)
    equal = Exchange(LINEAR[0], *(torch.full(shape, 0.1).to(dtype) for shape in (x, w, (12, 6))))
    scales = 10 ** (6 * torch.rand(x[0], 1) - 3)
    scaled = exchange(LINEAR[0], x, w, torch.float32)
    scaled = Exchange(LINEAR[0], *(t.to(dtype) for t in (scaled.x * scales, scaled.w / 100, scaled.g * scales)))
    for sent in (equal, scaled):
        assert all(found.passed for found in sent.judge(**sent.answers).values())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["linear", "groups, channels last", "channels last"])
@pytest.mark.parametrize("wrong", [1.0, nan, inf])
def test_verdicts_are_those_of_pytorch(kind, dtype, wrong):
    """Where the answer is wrong, where an operand is not finite, and where both are."""
    for broken in (False, True):
        sent, keys = exchange(*KINDS[kind], dtype), KeySchedule()
        answers = sent.answers
        for answer in answers.values():
            answer[(1, *[0] * (answer.dim() - 1))] += wrong * 30 * answer.abs().max()
        if broken:
            sent.g[-1] = inf
            sent.x[1 if kind == "linear" else -1] = nan
        keys = [keys.fresh(0, name) for name in ("w", "x")]

        def found(sent=sent, keys=keys, answers=answers) -> list[Residual]:
            source = WeightCheck(sent.product, sent.w, keys[0]).forward(sent.x, keys[1], keep=True)
            gradient = source.backward(sent.g, want_dx=True, want_dw=True)
            judges = [source.output, gradient.input_gradient, gradient.weight_gradient]
            return [judge(answer) for judge, answer in zip(judges, answers.values(), strict=True)]

        natively = found()
        with kernels.using("torch"):
            expected = found()
        for one, other in zip(natively, expected, strict=True):
            assert (one.passed, one.rows, one.unchecked) == (other.passed, other.rows, other.unchecked)
            if 1 < other.ratio < inf:
                assert one.row == other.row
                assert one.ratio == pytest.approx(other.ratio, rel=1e-3)
                assert one.tolerance == pytest.approx(other.tolerance, rel=1e-3)


@pytest.mark.parametrize("kind", ["y", "dx", "dw"])
def test_what_is_judged_is_the_copy_whatever_becomes_of_the_answer(kind, monkeypatch):
    """Shared memory is its worker's to change, between a first and a second reading too."""
    sent = exchange(*LINEAR)
    source, gradient = sent.checks()
    judge = {"y": source.output, "dx": gradient.input_gradient, "dw": gradient.weight_gradient}[kind]
    honest = sent.answers[kind]
    lie = honest.clone()
    lie[1, 1] += 30 * honest.abs().max()
    answer, into = lie.clone(), torch.empty_like(lie)

    def changed_at_once(x, *args, **options):
        found = of_rows(x, *args, **options)
        answer.copy_(honest)
        return found

    monkeypatch.setattr("tempo.verify.forms.of_rows", changed_at_once)
    assert not judge(answer, into).passed
    assert torch.equal(into, lie)

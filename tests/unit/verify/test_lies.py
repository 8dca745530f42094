"""Lies are found, at the stated rate and where they are."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from answering import ANSWERS, DTYPES, KEYS, KINDS, LINEAR, Exchange, exchange, exchanges
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from tempo.verify.checks import WeightCheck
from tempo.verify.tolerance import FALSE_ALARM, miss, threshold, unseen_ratio
from tempo.wire.messages import Linear


def element(honest: Tensor, other: Tensor) -> Tensor:
    lie = honest.clone()
    lie[(-1,) * lie.dim()] += 30 * honest.abs().max()
    return lie


def scaled_row(honest: Tensor, other: Tensor) -> Tensor:
    lie = honest.clone()
    lie[1] *= 4
    return lie


def swapped_rows(honest: Tensor, other: Tensor) -> Tensor:
    lie = honest.clone()
    lie[[0, 1]] = honest[[1, 0]]
    return lie


LIES = {
    "element": element,
    "scaled row": scaled_row,
    "swapped rows": swapped_rows,
    "stale": lambda honest, other: other,
    "zeros": lambda honest, other: torch.zeros_like(honest),
    "negated": lambda honest, other: -honest,
    "noise": lambda honest, other: honest + 3 * honest.std() * torch.randn(honest.shape),
    "no number": lambda honest, other: honest.masked_fill(honest == honest.max(), nan),
    "infinite": lambda honest, other: honest.masked_fill(honest == honest.max(), inf),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_lies_are_found(kind, dtype, lie):
    sent, before = exchange(*KINDS[kind], dtype), exchange(*KINDS[kind], dtype, seed=1)
    answers = {name: LIES[lie](answer, before.answers[name]).to(dtype) for name, answer in sent.answers.items()}
    for name, found in sent.judge(**answers).items():
        assert not found.passed, (name, found)


@settings(max_examples=80, deadline=None)
@given(exchanges(), st.data())
def test_one_wrong_element_is_found_anywhere(sent: Exchange, data):
    name = data.draw(st.sampled_from(ANSWERS))
    answer = sent.answers[name]
    assume(answer.numel())
    where = data.draw(st.integers(0, answer.numel() - 1))
    answer[torch.unravel_index(torch.tensor(where), answer.shape)] += 100 * (1 + answer.abs().max())
    assert not sent.judge(**{name: answer})[name].passed


def test_the_row_is_named():
    sent = exchange(*LINEAR)
    answers = sent.answers
    for row, answer in enumerate(answers.values(), 3):
        answer[row] += 1
    assert [found.row for found in sent.judge(**answers).values()] == [(3,), (4,), (5,)]
    image = exchange(*KINDS["conv2d"])
    lie = image.answers["y"]
    lie[2, 7, 1, 3] += 10  # channel 7 is in the second group of 6
    assert image.judge(y=lie)["y"].row == (1, (2 * lie.shape[2] + 1) * lie.shape[3] + 3)


@pytest.mark.parametrize("vectors", [1, 2, 4, 7])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("name", ANSWERS)
def test_residuals_of_a_lie_follow_the_stated_law(kind, name, vectors):
    sent = exchange(*KINDS[kind], torch.float64)
    lie = sent.answers[name]
    lie[(1, *[0] * (lie.dim() - 1))] += 1  # in one row, by 1
    squares = [sent.judge(vectors, **{name: lie})[name].residual ** 2 for _ in range(150)]
    # If the law holds, each of 24 cases fails once in 10^9 runs.
    assert stats.kstest(squares, "chi2", (vectors,)).pvalue > 1e-9


@pytest.mark.parametrize("vectors", [1, 2, 4, 8])
def test_thresholds_and_misses_are_those_of_chi_variables(vectors):
    assert stats.chi2.sf(threshold(vectors) ** 2, vectors) == pytest.approx(FALSE_ALARM, rel=1e-3)
    for ratio in (0.1, 1.0, 3.0, 10.0, 100.0):
        # `miss` is of the error's length over the tolerance, which is a threshold away from the error's own.
        assert miss(ratio, vectors) == pytest.approx(stats.chi2.cdf(1 / ratio**2, vectors), rel=1e-6)
    assert miss(0, vectors) == 1
    quiet = unseen_ratio(1000, vectors)
    assert stats.chi2.cdf(1 / quiet**2, vectors) ** 1000 == pytest.approx(0.5, rel=1e-3)


def test_lies_of_a_tenth_of_the_tolerance_pass_and_of_a_hundred_tolerances_do_not():
    sent = exchange(*LINEAR)
    answers = sent.answers
    for name, answer in answers.items():
        tolerance = sent.judge(**{name: answer * 2})[name].tolerance
        for ratio, passes in ((0.1, True), (100.0, False)):
            lie = answer.clone()
            lie[0, 0] += ratio * tolerance
            assert sent.judge(**{name: lie})[name].passed == passes


def test_secret_vectors_are_never_the_same_twice():
    sent = exchange(*KINDS["conv2d"])
    drawn = []
    for _ in range(3):
        weight = WeightCheck(sent.product, sent.w, KEYS.fresh(0, "w"))
        calls = [weight.forward(sent.x, KEYS.fresh(0, "x"), keep=True) for _ in range(3)]
        drawn += [*weight.r.reshape(-1), *weight.v.reshape(-1)]
        drawn += [number for call in calls for number in call.z.reshape(-1)]
    assert len({float(number) for number in drawn}) > 0.999 * len(drawn)  # float32 numbers may meet by chance


@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16], ids=str)
def test_a_worker_that_computes_more_coarsely_than_asked_is_found(coarse):
    sent = exchange(Linear(), (64, 128), (128, 128))
    cheap = Exchange(sent.product, sent.x.to(coarse), sent.w.to(coarse), sent.g.to(coarse))
    answers = {name: answer.float() for name, answer in cheap.answers.items()}
    assert not any(found.passed for found in sent.judge(**answers).values())


def test_of_what_is_not_finite_only_its_own_rows_go_unchecked():
    sent = exchange(*LINEAR)
    sent.g[3, 5] = nan
    sent.g[8, 6] = -inf
    answers = sent.answers
    found = sent.judge(**answers)
    assert {name: residual.unchecked for name, residual in found.items()} == {"y": 0, "dx": 2, "dw": 2}
    assert all(residual.passed for residual in found.values())
    for name, row in (("dx", 4), ("dw", 7)):
        lie = answers[name].clone()
        lie[row] *= 2
        found = sent.judge(**{name: lie})[name]
        assert not found.passed
        assert found.row == (row,)


def test_an_image_with_numbers_that_are_not_finite_goes_unchecked_alone():
    sent = exchange(*KINDS["conv2d"])
    sent.g[1, 0, 2, 2] = nan
    answers = sent.answers
    assert all(residual.passed for residual in sent.judge(**answers).values())
    answers["dx"][2] *= 2
    found = sent.judge(dx=answers["dx"])["dx"]
    assert not found.passed
    assert found.row[1] // answers["dx"][0, 0].numel() == 2


def test_an_honest_overflow_passes_and_an_invented_one_does_not():
    sent = exchange(*LINEAR, torch.float16)
    assert not sent.judge(y=torch.full_like(sent.answers["y"], inf))["y"].passed
    large = sent.scaled(x=3000.0)
    large.x[1:] /= 3000
    large.w[0] *= 1000
    answers = large.answers
    assert torch.isinf(answers["y"][0]).any()
    found = large.judge(y=answers["y"])["y"]
    assert found.passed
    assert found.unchecked == 1


def test_what_was_not_announced_is_not_judged():
    sent = exchange(*LINEAR)
    weight = WeightCheck(sent.product, sent.w, KEYS.fresh(0, "w"))
    source = weight.forward(sent.x, KEYS.fresh(0, "x"), keep=False)
    with pytest.raises(ValueError, match="keep=True"):
        source.backward(sent.g, want_dx=True, want_dw=True)
    gradient = source.backward(sent.g, want_dx=True, want_dw=False)
    assert gradient.input_gradient(sent.answers["dx"]).passed
    with pytest.raises(ValueError, match="no weight gradient"):
        gradient.weight_gradient(sent.answers["dw"])
    unwanted = weight.forward(sent.x, KEYS.fresh(0, "x"), keep=True, want_y=False)
    with pytest.raises(ValueError, match="no output"):
        unwanted.output(sent.answers["y"])
    assert unwanted.backward(sent.g, want_dx=False, want_dw=True).weight_gradient(sent.answers["dw"]).passed

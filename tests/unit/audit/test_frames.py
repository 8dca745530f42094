from __future__ import annotations

from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo.audit.solvers import frames
from tempo.audit.solvers.blockwise import PROJECTIONS, Halves, OneRound, TwoRounds, assign, block_sizes
from tempo.keys import KeySchedule
from tempo.schemes.masks import Form, draw_blocks
from tempo.schemes.sandwich import sandwich


def mask(features: int, block: int, rounds: int = 1) -> Tensor:
    operator = draw_blocks(KeySchedule().fresh(0, "w").stream("A"), features, block, rounds, 1.0).operator(Form.PLAIN)
    matrix = torch.empty(features, features, dtype=torch.float64)
    sandwich(torch.eye(features, dtype=torch.float64), operator, None, [matrix])
    return matrix


@given(features=st.integers(8, 40), block=st.integers(2, 8), rounds=st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_structures_of_true_masks_hold_them_exactly(features, block, rounds):
    true = mask(features, block)
    found = OneRound.near(true, block)
    assert found.matrix @ found.matrix.T == pytest.approx(torch.eye(features, dtype=torch.float64), abs=1e-9)


def test_one_round_is_found_exactly():
    true = mask(96, 8)
    assert OneRound.near(true, 8).matrix == pytest.approx(true, abs=1e-9)


def factored(true: Tensor, block: int) -> float:
    """Largest error of the better of both ways to group, as `solve_two_rounds` tries them."""
    errors = []
    for power in (1.0, 0.5):
        groups = Halves.of(true, block, power)
        for _ in range(PROJECTIONS):
            groups.project(true, block)
        errors.append(float((TwoRounds.near(true, groups, block).matrix - true).abs().max()))
    return min(errors)


def test_two_rounds_are_factored_exactly():
    errors = [factored(mask(128, 16, rounds=2), 16) for _ in range(5)]  # groups of one mask in a hundred are not found
    assert median(errors) < 1e-9, errors


def test_signs_are_found_by_sparsity():
    torch.manual_seed(0)
    w = torch.randn(96, 96, dtype=torch.float64)
    a, p = mask(96, 8), mask(96, 8)
    start = frames.start(frames.as_taps(p @ w @ a.T), frames.as_taps(w))
    assert start.sparsity > 5
    for estimate, true in ((start.a, a), (start.p, p)):
        assert abs(float((estimate * true).sum())) / 96 == pytest.approx(1, abs=1e-6)


def test_a_band_finds_what_signs_alone_do_not():
    torch.manual_seed(0)
    w = torch.randn(96, 96, dtype=torch.float64)
    moved = w + 0.15 * torch.randn(96, 96, dtype=torch.float64)
    a, p = mask(96, 8), mask(96, 8)
    masked, base = frames.as_taps(p @ moved @ a.T), frames.as_taps(w)
    by_signs, by_band = (abs(float((frames.start(masked, base, width).a * a).sum())) / 96 for width in (0.0, 0.03))
    assert by_band > max(0.8, by_signs + 0.2)


def test_blocks_are_sized_as_the_scheme_draws_them():
    for features, block in ((96, 8), (100, 8), (33, 32), (16, 32)):
        sizes = block_sizes(features, block)
        assert sum(sizes) == features
        assert max(sizes) - min(sizes) <= 1


def test_assignment_respects_sizes_and_leaves_over_what_does_not_fit():
    gains = torch.tensor([[3.0, 0], [2, 1], [1, 2], [0, 0]]).double().numpy()
    assert assign(gains, [1, 2]).tolist() == [0, 1, 1, -1]

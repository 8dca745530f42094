"""Entropy of keys, and mutual information between elements."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tempo.audit import lab
from tempo.audit.attacks.information import Information, _orthogonal_bits, mask_bits, mutual_information
from tempo.audit.controls.weak import small_mix
from tempo.audit.knowledge import Knowledge
from tempo.keys import Key
from tempo.schemes.tempo import Tempo

KEY = Key(b"s" * 32, "test")


def measured(model=None, x=None, **fields):
    torch.manual_seed(1)
    model = model or nn.Linear(64, 64)
    x = torch.randn(512, 64) if x is None else x
    with lab.open_lab(**fields) as opened:
        opened.session.protect(model, base="secret")
        model(x).square().sum().backward()
        opened.session.unprotect(model)
    finding = Information().run(opened.views[0], Knowledge(), opened.truth())
    return finding, {figure.name: figure.value for figure in finding.figures}


def test_independent_elements_share_nothing_and_equal_ones_everything():
    a, b = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(1))
    assert mutual_information(a, b) < 2e-3
    assert mutual_information(a, a) == pytest.approx(1, abs=2e-3)
    assert mutual_information(a.relu(), 2 * a.relu()) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_gaussian_pairs_share_what_theory_says(rho):
    a, noise = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    b = rho * a + (1 - rho**2) ** 0.5 * noise
    bits = mutual_information(a, b) * 4  # equally frequent bins: four bits
    assert bits == pytest.approx(-0.5 * math.log2(1 - rho**2), rel=0.12)


def test_permutations_move_elements_but_keep_them_whole():
    finding, figures = measured(scheme="tempo")
    assert finding.verdict == "broken"
    assert figures["at the same position"] < 0.05
    assert figures["at the best position"] > 0.95


def test_mixing_leaves_little_in_any_element_and_less_in_larger_blocks():
    finding, figures = measured(scheme="mix")
    assert finding.verdict == "resisted"
    small = measured(masks=small_mix(3, 3))[1]
    assert 2 * figures["at the best position"] < 0.015 < small["at the best position"]


def test_shield_rows_and_convolutions_are_measured():
    finding, figures = measured(nn.Conv2d(32, 32, 3), torch.randn(8, 32, 6, 6), scheme="mix")
    assert finding.verdict == "resisted"
    assert figures["key bits of rows"] > 0


def test_bits_of_permutations_and_scales():
    A, _ = Tempo(max_scale=4).feature_masks(KEY, 64, 64, 1, torch.float64)
    assert mask_bits(A) == pytest.approx(math.log2(math.factorial(64)) + 64 * 2)


def test_bits_of_one_dense_block_are_those_of_the_orthogonal_group():
    A, _ = small_mix(4).feature_masks(KEY, 4, 4, 1, torch.float64)
    # Both permutations are absorbed.
    assert mask_bits(A) == pytest.approx(_orthogonal_bits(4))
    # O(2) is two circles, of length 2π each.
    assert _orthogonal_bits(2) == pytest.approx(math.log2(4 * math.pi) + 24)

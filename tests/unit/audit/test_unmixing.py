"""Statistics of reused masks: what separates features, what does not, and what row mixing changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempo.audit import lab
from tempo.audit.attacks.covariance import Covariance
from tempo.audit.attacks.ica import ICA, reused
from tempo.audit.attacks.nmf import NMF
from tempo.audit.controls.toys import correlated_features, sparse_features
from tempo.audit.controls.weak import FeaturesReused, OneSided
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers.unmixing import Unmixing, gather, mean_best_correlation, separation, whiten

ROWS = 8192


def attack(which, recorded):
    finding = which().run(recorded.views[0], Knowledge(), recorded.truth())
    return finding, {figure.name: figure for figure in finding.figures}


def features(seed=1):
    return sparse_features(ROWS, 32, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("which", [ICA, NMF, Covariance])
def test_correlated_gaussian_features_are_not_separated(which):
    x = correlated_features(ROWS, 32, torch.Generator().manual_seed(1))
    finding, figures = attack(which, reused(x, FeaturesReused()))
    assert finding.verdict == "resisted"
    assert figures["features separated"].value < figures["features separated"].leaks - 0.1


def rectified(rows):
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(1)).relu()


def test_fresh_masks_leave_too_few_rows_of_each():
    x = rectified(4096)
    reusing, fresh = (
        attack(ICA, reused(x, masks))[1]["features separated"] for masks in (FeaturesReused(), OneSided())
    )
    # One batch of 1024 rows gives something away; further ones nothing more.
    assert fresh.value < reusing.value - 0.02


def served(x, row_block):
    """One mask of features for all rows, and mixed rows."""
    torch.manual_seed(1)
    model = nn.Linear(32, 32)
    with (
        lab.open_lab(scheme="mix", mix_row_block=row_block, insecure_small_blocks=True, rekey_rows=1 << 20) as opened,
        torch.no_grad(),
    ):
        opened.session.protect(model, base="secret")
        for batch in x.float().split(1024):
            model(batch)
    return opened


def test_row_mixing_takes_more_rows_to_see_through():
    few, many = (attack(ICA, served(features()[:rows], 32))[1]["features separated"].value for rows in (512, ROWS))
    assert few < 0.75 < 0.9 < many


def test_row_mixing_resists_where_features_are_less_sparse():
    finding, figures = attack(ICA, served(rectified(ROWS), 32))
    assert finding.verdict == "resisted"
    assert figures["features separated"].value < 0.6


def test_the_spectrum_of_inputs_is_known_even_so():
    assert attack(Covariance, served(features(), 32))[1]["error of the spectrum"].value < 1e-4


def test_pixels_of_convolutions_are_rows():
    torch.manual_seed(1)
    model = nn.Conv2d(32, 32, 1)
    x = sparse_features(ROWS, 32, torch.Generator().manual_seed(1)).float().view(32, 16, 16, 32).permute(0, 3, 1, 2)
    with lab.open_lab(scheme="insecure-plain") as opened:
        opened.session.protect(model, base="secret")
        model(x.contiguous())
    assert attack(ICA, opened)[1]["features separated"].value > 0.95


@pytest.mark.parametrize("which", [ICA, NMF, Covariance])
def test_too_few_rows_give_nothing_to_work_on(which):
    assert attack(which, reused(features()[:64], FeaturesReused()))[0].verdict == "not applicable"


@pytest.mark.parametrize("which", [ICA, NMF, Covariance])
def test_inputs_of_low_rank_are_attacked_in_their_span(which):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1024, 8, generator=generator) @ torch.randn(8, 32, generator=generator)
    assert attack(which, reused(x, FeaturesReused()))[0].verdict == "resisted"


def test_whitening_leaves_out_directions_without_variance():
    x = features()
    x = torch.cat([x, x[:, :3]], 1)
    white, _ = whiten(x)
    assert white.shape == (ROWS, 32)
    torch.testing.assert_close(white.T @ white / ROWS, torch.eye(32, dtype=torch.float64))


def test_best_correlations_do_not_depend_on_order_sign_or_scale_and_skip_dead_features():
    x = features()
    assert mean_best_correlation(torch.cat([x, torch.zeros(ROWS, 1)], 1), -3 * x.flip(1)) == pytest.approx(1)


def test_what_features_have_in_common_is_not_taken_for_separation():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2048, 1, generator=generator)
    features = common + 0.5 * torch.randn(2048, 64, generator=generator)
    model = nn.Linear(64, 8, bias=False)
    with lab.open_lab(scheme="mix", insecure_small_blocks=True, mix_block=8) as opened:
        opened.session.protect(model, base="secret")
        model(features)
        opened.session.unprotect(model)
    anything = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    (gathered,) = gather(opened.views[0], "quick")
    figure = separation([Unmixing(gathered, anything)], opened.truth(), "direction").figures[0]
    assert figure.value > 0.5  # any direction goes with the common part
    assert not figure.leaking
    assert figure.value < figure.chance + 0.2
    # Components that do not go together are no better than chance at less, and so leak from less.
    white = Unmixing(gathered, whiten(gathered.x)[1])
    assert separation([white], opened.truth(), "direction").figures[0].chance < figure.chance - 0.2

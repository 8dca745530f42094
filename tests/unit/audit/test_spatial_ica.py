"""Maps of convolutions: separating the pictures in them, and recognising known ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempo.audit import lab
from tempo.audit.attacks.span import Span
from tempo.audit.attacks.spatial_ica import SpatialICA
from tempo.audit.controls.toys import dead_leaves
from tempo.audit.controls.weak import Uncovered
from tempo.audit.knowledge import Knowledge


def convolve(x, **fields):
    torch.manual_seed(1)
    model = nn.Conv2d(x.shape[1], 32, 3)
    with lab.open_lab(**fields) as opened:
        opened.session.protect(model, base="secret")
        model(x)
    return opened


def attack(which, recorded):
    finding = which().run(recorded.views[0], Knowledge(), recorded.truth())
    return finding, {figure.name: figure.value for figure in finding.figures}


def test_pictures_in_plain_are_recognised_as_they_are():
    recorded = convolve(dead_leaves(8, 1, 32, torch.Generator().manual_seed(1)), scheme="insecure-plain")
    finding, figures = attack(SpatialICA, recorded)
    assert figures["images recognisable without unmixing"] == 1
    assert [len(pictures) for pictures in finding.panels[0].rows.values()] == [8, 8, 8, 8]


def test_channels_are_separated_too_where_they_are_independent():
    x = dead_leaves(32, 1, 32, torch.Generator().manual_seed(1)).view(4, 8, 32, 32)
    recorded = convolve(x, masks=Uncovered(8, 4))
    assert attack(SpatialICA, recorded)[1]["images recovered"] == 1


def test_what_all_pictures_have_in_common_does_not_count():
    generator = torch.Generator().manual_seed(1)
    common = 20 * dead_leaves(1, 1, 24, generator)
    x = common + torch.randn(16, 1, 24, 24, generator=generator)
    assert attack(SpatialICA, convolve(x, masks=Uncovered(1, 16)))[0].verdict == "resisted"


def test_noise_is_not_separated():
    recorded = convolve(torch.randn(16, 1, 24, 24, generator=torch.Generator().manual_seed(1)), masks=Uncovered(1, 16))
    finding, figures = attack(SpatialICA, recorded)
    assert finding.verdict == "resisted"
    assert figures["images recovered"] == 0


@pytest.mark.parametrize("which", [SpatialICA, Span])
def test_small_maps_and_more_maps_than_pixels_give_nothing_to_work_on(which):
    recorded = convolve(torch.randn(32, 32, 6, 6), scheme="mix")
    assert attack(which, recorded)[0].verdict == "not applicable"


@pytest.mark.parametrize(("scheme", "verdict"), [("tempo", "broken"), ("mix", "resisted")])
def test_maps_too_many_to_unmix_are_looked_at_as_they_are(scheme, verdict):
    recorded = convolve(dead_leaves(32, 32, 16, torch.Generator().manual_seed(1)), scheme=scheme)
    finding, figures = attack(SpatialICA, recorded)
    assert finding.verdict == verdict
    assert (figures["images recognisable without unmixing"] > 0.9) == (scheme == "tempo")


def test_single_precision_recognises_members_beside_shield_rows():
    recorded = convolve(dead_leaves(4, 32, 36, torch.Generator().manual_seed(1)), scheme="mix")
    assert recorded.views[0].calls[0].x.shape[0] == 32  # filled up
    finding, figures = attack(Span, recorded)
    assert finding.verdict == "broken"
    assert figures["members told from others"] == 1
    assert figures["residual of members"] < 1e-5 < 0.1 < figures["residual of others"]


def test_pictures_of_another_batch_are_not_taken_for_members():
    other = dead_leaves(16, 1, 32, torch.Generator().manual_seed(2))
    recorded = convolve(dead_leaves(16, 1, 32, torch.Generator().manual_seed(1)), masks=Uncovered(1, 16))
    views, truth = recorded.views, recorded.truth()
    for record in truth.records.values():
        if "x" in record:
            record["x"] = other
    assert Span().run(views[0], Knowledge(), truth).verdict == "resisted"

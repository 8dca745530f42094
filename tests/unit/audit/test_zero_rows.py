"""Rows of zeros in gradients, and what they give away."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tempo.audit import lab
from tempo.audit.attacks.zero_rows import ZeroRows
from tempo.audit.controls.toys import ClassTokenNet
from tempo.audit.controls.weak import Uncovered
from tempo.audit.knowledge import Knowledge


def loss(model, x, labels):
    return F.cross_entropy(model(x), labels)


def attack(recorded):
    finding = ZeroRows().run(recorded.views[0], Knowledge(), recorded.truth())
    return finding, {figure.name: figure.value for figure in finding.figures}


def class_token_run(**fields):
    torch.manual_seed(1)
    model = ClassTokenNet(width=64)
    tokens = torch.randn(16, 127, 64) + 2 * torch.randn(16, 1, 64)
    return lab.train(
        model,
        [(tokens, torch.arange(16) % 10)],
        loss,
        trusted=("qkv.*", "up.*", "out.*", "head"),
        **fields,
    )


def test_two_rounds_hide_single_rows_but_not_their_span():
    finding, figures = attack(class_token_run(masks=Uncovered(rounds=2)))
    assert finding.verdict == "resisted"
    assert figures["live rows isolated"] == 0
    assert figures["live rows in a known span"] == 1
    assert figures["residual of live rows in the span"] < 1e-4


@pytest.mark.parametrize("base", ["secret", "public"])
def test_mix_covers_rows_of_zeros(base):
    finding, figures = attack(class_token_run(scheme="mix", base=base))
    assert finding.verdict == "resisted"
    assert figures["live rows isolated"] == 0
    assert figures["live rows in a known span"] == 0


def test_rows_that_are_only_permuted_stand_alone():
    _, figures = attack(class_token_run(scheme="tempo"))
    assert figures["live rows isolated"] == 1


def test_nothing_is_found_where_every_row_has_a_gradient():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    recorded = lab.train(
        model, [(torch.randn(512, 64), torch.arange(512) % 10)], loss, masks=Uncovered(), trusted=("2",)
    )
    finding, figures = attack(recorded)
    assert finding.verdict == "resisted"
    assert all(figures[name] == 0 for name in figures if "residual" not in name)


@pytest.mark.parametrize("masks", [Uncovered(), None])
def test_a_dead_feature_shows_its_column_unless_nothing_is_mixed(masks):
    torch.manual_seed(1)
    x = torch.randn(512, 64)
    x[:, 7] = 0
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    fields = {"masks": masks} if masks else {"scheme": "insecure-plain"}
    recorded = lab.train(model, [(x, torch.arange(512) % 10)], loss, trusted=("2",), **fields)
    assert attack(recorded)[1]["dead columns isolated"] == 1


def test_convolutions_and_several_workers_are_attacked_too():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(32 * 16, 10))
    recorded = lab.train(
        model,
        [(torch.randn(128, 32, 4, 4), torch.arange(128) % 10)],
        loss,
        scheme="mix",
        trusted=("3",),
        workers=2,
        divide_flops=1,
    )
    finding, figures = attack(recorded)
    assert finding.verdict == "resisted"
    assert figures["live rows isolated"] == 0


def test_a_transcript_without_gradients_gives_nothing_to_work_on():
    with lab.open_lab(scheme="mix") as opened:
        model = nn.Linear(64, 64)
        opened.session.protect(model, base="secret")
        with torch.no_grad():
            model(torch.randn(64, 64))
        views = opened.views
    assert ZeroRows().run(views[0], Knowledge(), None).verdict == "not applicable"

"""What weight gradients of small batches give away."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempo.audit import lab
from tempo.audit.attacks.gradient_leakage import GradientLeakage, tiny_batch
from tempo.audit.knowledge import Knowledge


def attack(recorded):
    finding = GradientLeakage().run(recorded.views[0], Knowledge(), recorded.truth())
    return finding, {figure.name: figure.value for figure in finding.figures}


def test_classes_of_a_tiny_batch_show_in_signs():
    assert attack(tiny_batch(4, scheme="insecure-plain"))[1]["classes told to occur"] == 1


def test_large_batches_hide_their_samples_even_in_plain():
    finding, figures = attack(tiny_batch(64, scheme="insecure-plain"))
    assert finding.verdict == "resisted"
    assert figures["inputs found"] == 0


def test_permutations_leave_samples_apart_but_under_their_mask():
    finding, figures = attack(tiny_batch(4, scheme="tempo"))
    assert finding.verdict == "resisted"
    assert figures["inputs found under the mask of features"] == 1
    assert figures["error of the number of rows"] == 0


@pytest.mark.parametrize("count", [1, 4])
def test_mixing_hides_samples_and_how_many_there_are(count):
    finding, figures = attack(tiny_batch(count, scheme="mix", trusted=("2",)))
    assert finding.verdict == "resisted"
    assert figures["inputs found under the mask of features"] == 0
    assert figures["error of the number of rows"] > 0  # shield rows


def test_convolutions_and_evaluation_give_nothing_to_work_on():
    torch.manual_seed(1)
    model = nn.Conv2d(32, 32, 3)
    with lab.open_lab(scheme="mix") as opened:
        opened.session.protect(model, base="secret")
        model(torch.randn(32, 32, 6, 6)).sum().backward()
        with torch.no_grad():
            model(torch.randn(32, 32, 6, 6))
    assert attack(opened)[0].verdict == "not applicable"

"""Cross-layer matching finds what permutations and scales leave, and nothing where blocks mix."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import nn

from tempo.audit import lab
from tempo.audit.attacks.cross_layer import CrossLayer
from tempo.audit.controls import victims
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers.matching import match, stacks
from tempo.audit.transcript import View


def figures(recorded):
    finding = CrossLayer().run(recorded.views[0], Knowledge(), recorded.truth)
    return finding, {figure.name: figure.value for figure in finding.figures}


def scrambled(x, generator):
    """Rows and columns permuted and scaled by 1 to 255, as `tempo` does; and the permutations."""
    rows, columns = (torch.randperm(size, generator=generator) for size in x.shape[:2])
    scales = [torch.randint(1, 256, (size,), generator=generator).double() for size in x.shape[:2]]
    x = x.double()[rows][:, columns]
    x = x * scales[0].view(-1, *[1] * (x.dim() - 1)) / scales[1].view(-1, *[1] * (x.dim() - 2))
    return x.float(), rows, columns


def test_a_gelu_network_is_matched_by_values():
    finding, found = figures(victims.gelu_mlp().record("tempo"))
    assert finding.verdict == "broken"
    assert found["channels matched"] > 0.95
    assert found["rows matched"] > 0.99


def test_maps_of_a_residual_network_are_matched_with_nothing_known():
    finding, found = figures(victims.resnet().record("tempo"))
    assert finding.verdict == "broken"
    assert found["channels matched"] > 0.6
    assert found["rows matched"] > 0.7


def test_signs_of_features_keep_nobody_from_matching_layers():
    # Under a few masks in a hundred it ends at another matching: whoever attacks has more than one to look at.
    findings, found = zip(*(figures(victims.gelu_mlp().record("tempo-signed")) for _ in range(3)), strict=True)
    assert {finding.verdict for finding in findings} == {"broken"}
    assert median(one["channels matched"] for one in found) > 0.9
    assert median(one["rows matched"] for one in found) > 0.99


def test_mixing_leaves_nothing_to_match():
    finding, found = figures(replace(victims.relu_mlp(), batch=64).record("mix"))
    assert finding.verdict == "resisted"
    assert found["channels matched"] < 0.02
    assert found["rows matched"] < 0.02


@pytest.mark.parametrize("signed", [True, False])
def test_batch_norm_between_convolutions_does_not_help(signed):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(32, 24, 6, 6, generator=generator).cumsum(2).cumsum(3)
    norm = nn.BatchNorm2d(24)
    with torch.no_grad():
        norm.bias.normal_(0, 0.5, generator=generator)
        if not signed:
            norm.weight.copy_(torch.where(torch.arange(24) < 4, -1.0, 1.0))
        x = torch.relu(norm(y))
    (first, rows, columns), (second, rows2, columns2) = scrambled(y, generator), scrambled(x, generator)
    found = match(stacks(first, None, output=True), stacks(second, None, output=False), signed=signed)
    assert torch.equal(rows2[found.rows], rows)
    assert torch.equal(columns2[found.columns], columns)
    if not signed:
        assert torch.equal(found.correlations < 0, columns < 4)


def test_unrelated_layers_are_not_scored():
    torch.manual_seed(0)
    with lab.open_lab(scheme="tempo") as opened:
        layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        opened.session.protect(layers, base="secret")
        for layer in layers:
            layer(torch.randn(64, 64))
        finding = CrossLayer().run(opened.views[0], Knowledge(), opened.truth())
    assert finding.verdict == "not applicable"
    assert "element-wise" in finding.reason


def test_nothing_recorded_is_nothing_to_match():
    assert CrossLayer().run(View("a"), Knowledge(), None).verdict == "not applicable"


def test_layers_that_widen_are_scored_in_plain_too():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 40))
    with lab.open_lab(scheme="insecure-plain") as opened:
        opened.session.protect(layers)(torch.randn(64, 32))
    finding = CrossLayer().run(opened.views[0], Knowledge(), opened.truth())
    assert finding.verdict == "broken"

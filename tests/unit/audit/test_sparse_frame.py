from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tempo.audit.attack import Evidence, NotApplicable
from tempo.audit.attacks.sparse_frame import TRIES, SparseFrame, luckiest, purity, single, targets, undo
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import small_mix
from tempo.audit.knowledge import Knowledge


def figures(evidence: Evidence) -> dict[str, float]:
    attack = SparseFrame()
    finding = attack.run(evidence.view, evidence.knowledge.only(attack.knows), evidence.truth)
    return {figure.name: figure.value for figure in finding.figures}


def several(base: nn.Module, **fields: Any) -> Evidence:
    """Recordings of as many calls as the attack tries: it fails on the masks of one in some tens."""
    return basecase.record(base, steps=TRIES, lr=1e-6, **fields)


def test_blocks_of_the_default_side_fall_too():
    found = figures(several(single(96), drift=0.02, masks=small_mix(32)))
    assert found["delta error"] < 0.7  # expected: √((d+m)(s−1)/(2dm)) = 0.57
    assert found["purity of blocks"] == 1
    assert found["row correlation"] > 0.99


def test_dense_masks_hold():
    found = figures(basecase.record(single(64), drift=0.02, masks=small_mix(64)))
    assert found["delta error"] > 0.9
    assert found["row correlation"] < 0.3


def test_layers_that_share_an_input_are_attacked_together():
    base = basecase.Attention(64, 64)
    inputs = torch.randn(64, 4, 64)
    evidence = basecase.record(base, drift=0.02, masks=small_mix(8), inputs=inputs, steps=4)
    stacked = [pair for pair in targets(evidence.view, evidence.knowledge, "full") if len(pair[0].w) == 192]
    guess = luckiest(evidence.view, *stacked[0], undo)
    assert guess.name == "query.weight + key.weight + value.weight"
    error = basecase.scored(guess, evidence.truth).error
    assert error is not None
    assert error < 0.6


def test_convolutions_fall_by_all_their_taps():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1))
    evidence = several(base, drift=0.02, masks=small_mix(8), inputs=torch.randn(64, 32, 4, 4))
    assert figures(evidence)["delta error"] < 0.4


def test_wide_layers_fall_on_either_side():
    for outputs, inputs in ((64, 128), (128, 64)):
        evidence = several(single(inputs, outputs), drift=0.01, masks=small_mix(16))
        assert figures(evidence)["delta error"] < 0.7


def test_nothing_private_is_not_a_leak():
    evidence = basecase.record(single(32), drift=0.0, masks=small_mix(4), lr=0.0)
    attack = SparseFrame()
    assert attack.run(evidence.view, evidence.knowledge, evidence.truth).verdict == "not applicable"


def test_without_a_public_weight_of_the_shape_there_is_nothing_to_attack():
    evidence = basecase.record(single(32), masks=small_mix(4))
    with pytest.raises(NotApplicable, match="shape"):
        SparseFrame().recover(evidence.view, Knowledge(base={"w": torch.zeros(7, 5)}), "quick")


def test_purity_is_of_groups_matched_best():
    assert purity(torch.tensor([0, 0, 1, 1]).numpy(), torch.tensor([1, 1, 0, 0]).numpy()) == 1
    assert purity(torch.tensor([0, 0, 1, 1]).numpy(), torch.tensor([0, 1, 0, 1]).numpy()) == 0.5

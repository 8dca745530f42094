from __future__ import annotations

import pytest
import torch

from tempo.audit.attack import NotApplicable
from tempo.audit.attacks.sparse_frame import single
from tempo.audit.attacks.sparse_frame_inputs import SparseFrameInputs
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import small_mix
from tempo.audit.knowledge import Knowledge


def test_dense_masks_keep_the_private_change():
    torch.manual_seed(0)
    inputs = torch.randn(1024, 64) @ torch.randn(64, 64)
    evidence = basecase.record(single(64), drift=0.02, inputs=inputs, masks=small_mix(64))
    attack = SparseFrameInputs()
    finding = attack.run(evidence.view, evidence.knowledge, evidence.truth)
    assert finding.verdict == "resisted"
    assert finding.figures[0].value > 0.95


def test_without_inputs_there_are_no_signs():
    evidence = basecase.record(single(64), drift=0.02, masks=small_mix(8))
    with pytest.raises(NotApplicable):
        SparseFrameInputs().recover(evidence.view, Knowledge(base=evidence.knowledge.base), "quick")

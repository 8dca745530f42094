from __future__ import annotations

import pytest

from tempo.audit.attack import NotApplicable
from tempo.audit.attacks.robust_pca import RobustPCA
from tempo.audit.attacks.sparse_frame import single
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import small_mix
from tempo.schemes.mix_tuned import MixTuned


def test_dense_masks_under_a_cloak_hold():
    attack = RobustPCA()
    evidence = basecase.record(single(64), drift=0.05, masks=MixTuned())
    finding = attack.run(evidence.view, evidence.knowledge, evidence.truth)
    assert finding.verdict == "resisted"
    assert finding.figures[0].value > 0.95


def test_products_too_small_for_a_cloak_are_left_alone():
    evidence = basecase.record(single(24), drift=0.05, masks=small_mix(4))
    with pytest.raises(NotApplicable, match="features on each side"):
        RobustPCA().recover(evidence.view, evidence.knowledge, "quick")

from __future__ import annotations

import pytest

from tempo.audit.attack import NotApplicable
from tempo.audit.attacks.consensus import Consensus
from tempo.audit.attacks.sparse_frame import single
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import small_mix


def test_four_steps_leave_a_third_of_what_one_leaves():
    evidence = basecase.record(single(64), drift=0.02, steps=4, lr=1e-6, masks=small_mix(8))
    attack = Consensus()
    finding = attack.run(evidence.view, evidence.knowledge, evidence.truth)
    found = {figure.name: figure.value for figure in finding.figures}
    assert found["steps joined"] == 4
    assert found["delta error"] < found["delta error, newest step alone"] / 3


def test_dense_masks_hold_over_steps():
    evidence = basecase.record(single(64), drift=0.02, steps=3, lr=1e-6, masks=small_mix(64))
    attack = Consensus()
    assert attack.run(evidence.view, evidence.knowledge, evidence.truth).verdict == "resisted"


def test_one_step_has_nothing_to_join():
    evidence = basecase.record(single(64), drift=0.02, masks=small_mix(8))
    with pytest.raises(NotApplicable, match="two different masks"):
        Consensus().recover(evidence.view, evidence.knowledge, "quick")

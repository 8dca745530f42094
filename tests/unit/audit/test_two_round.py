from __future__ import annotations

import pytest

from tempo.audit.attack import NotApplicable
from tempo.audit.attacks.sparse_frame import single
from tempo.audit.attacks.two_round import TwoRound
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import small_mix


def test_one_dense_block_holds():
    attack = TwoRound()
    evidence = basecase.record(single(64), drift=0.02, masks=small_mix(64))
    finding = attack.run(evidence.view, evidence.knowledge, evidence.truth)
    assert finding.verdict == "resisted"
    assert finding.figures[0].value > 0.95


def test_weights_that_are_not_square_are_left_to_others():
    evidence = basecase.record(single(32, 48), drift=0.02, masks=small_mix(8))
    with pytest.raises(NotApplicable, match="as many outputs as inputs"):
        TwoRound().recover(evidence.view, evidence.knowledge, "quick")

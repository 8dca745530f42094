from __future__ import annotations

import pytest

from tempo.audit.attack import Evidence, Finding
from tempo.audit.attacks.cloak_truncation import CloakTruncation
from tempo.audit.attacks.sparse_frame import single
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import StrongCloak, small_mix
from tempo.schemes.mix import Mix


def run(evidence: Evidence) -> Finding:
    return CloakTruncation().run(evidence.view, evidence.knowledge, evidence.truth)


def test_the_stronger_a_cloak_the_less_is_left_of_it():
    left = {energy: run(basecase.record(single(128), masks=StrongCloak(energy))).figures for energy in (0.5, 4.0)}
    assert left[4.0][0].value < 0.005 < left[0.5][0].value
    assert left[4.0][1].value == pytest.approx(4, rel=1e-4)


def test_a_cloak_inside_the_spectrum_stays():
    finding = run(basecase.record(single(128), masks=Mix(cloak=16)))
    assert finding.verdict == "resisted"
    assert finding.figures[0].value > 0.5


def test_there_is_nothing_to_drop_without_a_cloak():
    assert run(basecase.record(single(64), masks=small_mix(8))).verdict == "not applicable"

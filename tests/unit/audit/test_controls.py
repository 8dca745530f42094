"""Every attack first breaks what it is known to break."""

from __future__ import annotations

import pytest

from tempo.audit.attacks import REGISTRY


@pytest.mark.parametrize("name", REGISTRY)
def test_an_attack_breaks_its_control(name):
    attack = REGISTRY[name]()
    control = attack.control()
    finding = attack.run(control.evidence.view, control.evidence.knowledge, control.evidence.truth)
    figures = {figure.name: figure for figure in finding.figures}
    assert control.figure in figures, f"{finding.verdict}: {finding.reason}"
    figure = figures[control.figure]
    assert (figure.value >= control.bound) if figure.higher_leaks else (figure.value <= control.bound)
    assert finding.verdict == "broken"

"""Every attack first breaks what it is known to break."""

from __future__ import annotations

import pytest

from tempo.audit.attacks import REGISTRY


@pytest.mark.parametrize("name", REGISTRY)
def test_an_attack_breaks_its_control(name):
    found: list[str] = []
    while len(found) < 3:  # masks are of different luck: some attacks fail on one in thirty
        attack = REGISTRY[name]()
        control = attack.control()
        finding = attack.run(control.evidence.view, control.evidence.knowledge, control.evidence.truth)
        figures = {figure.name: figure for figure in finding.figures}
        assert control.figure in figures, f"{finding.verdict}: {finding.reason}"
        figure = figures[control.figure]
        reached = (figure.value >= control.bound) if figure.higher_leaks else (figure.value <= control.bound)
        if reached and finding.verdict == "broken":
            return
        found.append(f"{figure.value:.3g}, {finding.verdict}")
    pytest.fail(f"{control.figure} should reach {control.bound}: {'; '.join(found)}")

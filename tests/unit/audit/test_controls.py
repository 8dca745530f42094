"""Every attack first breaks what it is known to break."""

from __future__ import annotations

import pytest

from tempo.audit.attacks import REGISTRY


def broken(name: str) -> bool:
    """Whether the attack breaks a new recording of its control, as far as the control says."""
    attack = REGISTRY[name]()
    control = attack.control()
    finding = attack.run(control.evidence.view, control.evidence.knowledge, control.evidence.truth)
    figures = {figure.name: figure for figure in finding.figures}
    assert control.figure in figures, f"{finding.verdict}: {finding.reason}"
    figure = figures[control.figure]
    reached = (figure.value >= control.bound) if figure.higher_leaks else (figure.value <= control.bound)
    return reached and finding.verdict == "broken"


@pytest.mark.parametrize("name", REGISTRY)
def test_an_attack_breaks_its_control(name):
    """Some masks are luckier than others: two recordings of three."""
    assert broken(name) or (broken(name) and broken(name))

"""Runs positive controls as a part of a report: an attack counts only where it breaks what it is known to break."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from tempo.audit.attack import Attack
from tempo.audit.attacks import REGISTRY
from tempo.audit.report.contents import CONTROL, Run


def run(names: Iterable[str] = ()) -> Run:
    """A run whose findings are what each attack reached on its own control; ``reason`` says where the bound is from.

    Args:
        names: Which attacks; all by default.
    """
    findings = []
    for name in names or REGISTRY:
        attack: Attack = REGISTRY[name]()
        control = attack.control()
        found = attack.run(control.evidence.view, control.evidence.knowledge, control.evidence.truth)
        # The figure that the bound is about comes first.
        figures = sorted(found.figures, key=lambda figure: figure.name != control.figure)
        findings.append(
            msgspec.structs.replace(found, figures=figures, curves=[], panels=[], worker="", reason=control.source)
        )
    return Run(title="positive controls", scheme=CONTROL, settings={}, base="unknown", facts=[], findings=findings)

"""Runs attacks against what workers saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tempo.audit.attack import Effort, Finding
from tempo.audit.attacks import REGISTRY
from tempo.audit.knowledge import Knowledge
from tempo.audit.transcript import View
from tempo.audit.truth import Truth
from tempo.errors import SettingsError, nearest


def chosen(names: Iterable[str]) -> list[str]:
    """Attacks by name; all of them where none is named.

    Raises:
        SettingsError: There is no such attack.
    """
    names = list(names)
    for name in names:
        if name not in REGISTRY:
            raise SettingsError(f"unknown attack {name!r}; {nearest(name, REGISTRY)}")
    return names or list(REGISTRY)


def attack(
    views: list[View],
    knowledge: Knowledge,
    truth: Truth | None,
    names: Iterable[str] = (),
    effort: Effort = "quick",
    report: Callable[[str], None] = lambda _: None,
) -> list[Finding]:
    """Run attacks on every view, each with only the facts that it asks for.

    Args:
        views: What each worker saw.
        knowledge: What the attacker knows besides.
        truth: To score by, or None.
        names: Which attacks; all by default.
        effort: How long they may take.
        report: Called with a line before each attack.

    Returns:
        A finding for every attack and view; attacks that need more than is known say so.
    """
    findings = []
    for name in chosen(names):
        single = REGISTRY[name]()
        missing = sorted(single.knows - knowledge.facts)
        if missing:
            findings.append(
                Finding(
                    attack=name,
                    knows=sorted(single.knows),
                    tries=single.tries,
                    verdict="not applicable",
                    reason=f"needs to know the {' and the '.join(missing)}",
                )
            )
            continue
        for view in views:
            report(f"{name} on {view.worker or 'the worker'}")
            findings.append(single.run(view, knowledge, truth, effort))
    return findings

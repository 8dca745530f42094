"""What a report comes to at each level of an attacker's knowledge: the HTML page and the threat matrix share it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tempo.audit.attack import Figure, Finding
from tempo.audit.knowledge import Fact
from tempo.audit.report.contents import CONTROL, Report, Run


@dataclass(frozen=True)
class Level:
    """How much an attacker knows besides what it received.

    Attributes:
        key: For links.
        title: A few words.
        needs: Facts that must be at hand; at every level but the first the architecture is known, too.
        who: One sentence.
    """

    key: str
    title: str
    needs: frozenset[Fact]
    who: str

    @property
    def facts(self) -> frozenset[Fact]:
        """All that is known here: attacks that need no more can be tried."""
        return self.needs | {"architecture"} if self.needs else self.needs


LEVELS: tuple[Level, ...] = (
    Level("nothing", "nothing", frozenset(), "The worker has what it received and returned, and nothing else."),
    Level(
        "architecture",
        "architecture",
        frozenset({"architecture"}),
        "The worker also knows the architecture, and so which product belongs to which layer.",
    ),
    Level(
        "data",
        "data distribution",
        frozenset({"data"}),
        "The worker also has samples like the victim's, but none of the victim's own.",
    ),
    Level(
        "base",
        "base checkpoint",
        frozenset({"base"}),
        "The worker also has the public checkpoint that training started from.",
    ),
    Level(
        "base-data",
        "base + data distribution",
        frozenset({"base", "data"}),
        "The worker has both: the public checkpoint, and samples like the victim's.",
    ),
)

_OF_THE_MODEL = {"trusted", "offload", "placement"}
"""Settings that say which layers go out, by their names in one model: runs of several models differ in them."""


def level_of(finding: Finding) -> Level:
    """The first level at which the attack can be tried."""
    return next(level for level in LEVELS if level.facts >= set(finding.knows))


def within(run: Run, level: Level) -> bool:
    """Whether the attacker of ``run`` was given what ``level`` needs."""
    return level.needs <= set(run.facts)


def at(run: Run, level: Level) -> list[Finding]:
    """Findings of attacks that can be tried at ``level`` and not before."""
    return [finding for finding in run.findings if level_of(finding) is level]


@dataclass(frozen=True)
class Standing:
    """How one or more runs stand at one level, everything below it included.

    Attributes:
        verdict: ``broken`` if any attack succeeded; ``untried`` if none was tried at all.
        decisive: The finding that got furthest, and its run; of those that succeed at this level and not before, if
            there are any. None where nothing was scored.
        tried: Number of scored findings.
        since: The lowest level at which an attack succeeded.
        inherited: Whether lower levels say all of it: nothing more broke here, or nothing more was tried.
    """

    verdict: Literal["broken", "resisted", "not scored", "not applicable", "untried"]
    decisive: tuple[Run, Finding] | None = None
    tried: int = 0
    since: Level | None = None
    inherited: bool = False

    @property
    def own(self) -> Level | None:
        """The level of the decisive finding."""
        return level_of(self.decisive[1]) if self.decisive else None


def standing(runs: Iterable[Run], level: Level) -> Standing:
    """The worst that was found in any of ``runs`` at ``level`` or below it."""
    found = [(run, f) for run in runs if within(run, level) for f in run.findings if set(f.knows) <= level.facts]
    scored = [(run, f) for run, f in found if f.verdict in ("broken", "resisted") and f.figures]
    broken = [(run, f) for run, f in scored if f.verdict == "broken"]
    if scored:
        own = [(run, f) for run, f in broken or scored if level_of(f) is level]
        return Standing(
            verdict="broken" if broken else "resisted",
            decisive=max((own if broken else []) or broken or scored, key=lambda pair: progress(pair[1].figures[0])),
            tried=len(scored),
            since=next((low for low in LEVELS if any(level_of(f) is low for _, f in broken)), None),
            inherited=not own,
        )
    if any(f.verdict == "not scored" for _, f in found):
        return Standing("not scored")
    return Standing("not applicable" if found else "untried")


def progress(figure: Figure) -> float:
    """How far the attack got, from 0 (chance) to 1 (everything in clear); what it lacks is taken as 0 or 1."""
    chance = figure.chance if figure.chance is not None else (0.0 if figure.higher_leaks else 1.0)
    ceiling = figure.ceiling if figure.ceiling is not None else (1.0 if figure.higher_leaks else 0.0)
    if chance == ceiling:
        return float(figure.leaking)
    return min(max((figure.value - chance) / (ceiling - chance), 0.0), 1.0)


def subjects(report: Report) -> dict[str, list[Run]]:
    """Runs by what was attacked: the scheme, by whom, with those settings in which the report's runs of it differ."""
    runs = [run for run in report.runs if run.scheme != CONTROL]
    named: dict[str, list[Run]] = {}
    for run in runs:
        same = [other.settings for other in runs if other.scheme == run.scheme]
        varied = [
            name
            for name in run.settings
            if name not in _OF_THE_MODEL and len({settings.get(name) for settings in same}) > 1
        ]
        texts = [f"{name} = {run.settings[name]}" for name in varied]
        named.setdefault(subject(run) + (f" ({', '.join(texts)})" if texts else ""), []).append(run)
    return named


def subject(run: Run) -> str:
    """The scheme, and who attacked it."""
    return f"{run.scheme}, {run.attacker}" if run.attacker else run.scheme


def control_of(report: Report, attack: str) -> Finding | None:
    """What ``attack`` reached on its positive control, if the report says."""
    controls = (finding for run in report.runs if run.scheme == CONTROL for finding in run.findings)
    return next((finding for finding in controls if finding.attack == attack), None)


def number(value: float) -> str:
    """Three digits, the way people write them."""
    if not math.isfinite(value):
        return "undefined" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = f"{mantissa.removesuffix('.0')}×10{raised}"
    else:
        text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return text.replace("-", "−")

"""The report as one self-contained page: no script, no link to elsewhere; names and texts in it count as hostile."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from tempo.audit.attack import Curve, Figure, Finding, Panel
from tempo.audit.report import charts, levels
from tempo.audit.report.contents import Report, Run
from tempo.audit.report.levels import LEVELS, Level, Standing, number

MARKS = {"broken": "✕", "resisted": "○", "not applicable": "–", "not scored": "?", "untried": "·"}
"""Signs of the verdicts, since colour alone tells nothing to many."""

WHOM = {
    "nothing": "by any worker, which need not know anything but what it received",
    "architecture": "by a worker that knows the architecture",
    "data": "by a worker that has data of the same distribution",
    "base": "by a worker that knows the public checkpoint",
    "base-data": "by a worker that knows the public checkpoint and has data of the same distribution",
}


def page(report: Report) -> str:
    """The whole page as HTML, for any browser, light or dark, narrow or wide; images are embedded.

    Args:
        report: What an audit found. Its texts are escaped, whatever they hold.
    """
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            subjects=list(_subjects(report)),
            attacks=_attacks(report),
            tally=_tally(report),
            threshold=_threshold,
            elsewhere={run.scheme: run.made for run in report.runs if run.made},
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tempo.audit.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "number": number,
        "percent": _percent,
        "minutes": _minutes,
        "slug": _slug,
        "mark": MARKS.__getitem__,
        "gauge": charts.gauge,
        "chart": charts.line_chart,
        "key": charts.key,
        "threshold_key": charts.threshold_key,
        "LEVELS": LEVELS,
    }
    return environment


@dataclass(frozen=True)
class _Section:
    """What one level adds to a run."""

    level: Level
    id: str
    tried: list[Finding]
    """Scored findings, the furthest first."""

    silent: list[Finding]
    """Those that did not apply or were not scored."""

    summary: str

    @property
    def curves(self) -> list[tuple[Finding, Curve]]:
        return [(finding, curve) for finding in self.tried for curve in finding.curves]

    @property
    def panels(self) -> list[tuple[Finding, Panel]]:
        return [(finding, panel) for finding in self.tried for panel in finding.panels]


@dataclass(frozen=True)
class _Audited:
    """A run as the page shows it."""

    id: str
    run: Run
    start: str
    workers: int
    sections: list[_Section]
    beyond: list[str]
    """Attacks that need what the attacker of this run does not know."""

    cells: list[tuple[Level, Standing, str]]
    """For each level: how it stands, and the id of the section to go to, if there is one."""


@dataclass(frozen=True)
class _Subject:
    """A scheme with its runs."""

    id: str
    title: str
    summary: str
    runs: list[_Audited]


def _subjects(report: Report) -> Iterator[_Subject]:
    taken: set[str] = set()
    for title, runs in levels.subjects(report).items():
        subject = _unique(_slug(f"scheme {title}"), taken)
        audited = [_audited(run, _unique(f"{subject}-{_slug(run.title)}-{run.base}", taken)) for run in runs]
        yield _Subject(subject, title, _subject_summary(title, runs), audited)


def _audited(run: Run, anchor: str) -> _Audited:
    sections = []
    for level in LEVELS:
        found = levels.at(run, level)
        if found and levels.within(run, level):
            tried = [f for f in found if f.verdict in ("broken", "resisted") and f.figures]
            tried.sort(key=lambda f: (f.verdict != "broken", -levels.progress(f.figures[0])))
            silent = [f for f in found if f not in tried]
            sections.append(_Section(level, f"{anchor}-{level.key}", tried, silent, _level_summary(tried)))
    beyond = list(dict.fromkeys(f.attack for f in run.findings if not levels.within(run, levels.level_of(f))))
    shown = {section.level: section.id for section in sections}
    cells = []
    for level in LEVELS:
        stands = levels.standing([run], level)
        cells.append((level, stands, shown.get(stands.own or level, anchor)))
    return _Audited(
        anchor, run, _start(run), len({f.worker for f in run.findings if f.worker}), sections, beyond, cells
    )


def _start(run: Run) -> str:
    starts = {
        "secret": "from secret initial weights",
        "public": "from a public checkpoint",
        "unknown": "of unknown origin",
    }
    return starts[run.base]


def _subject_summary(title: str, runs: list[Run]) -> str:
    stands = [(level, levels.standing(runs, level)) for level in LEVELS]
    if not any(standing.tried for _, standing in stands):
        return f"No attack on {title} was scored, so nothing is said about it."
    failed = 0
    for level, standing in stands:
        if standing.verdict == "broken" and standing.decisive is not None:
            _, finding = standing.decisive
            attempts = "1 attempt was" if failed == 1 else f"{failed} attempts were"
            less = f" With less, {attempts} made and failed." if failed else ""
            return f"Broken {WHOM[level.key]}: {finding.attack}, {_sentence(finding.figures[0])}{less}"
        failed = max(failed, standing.tried)
    return "Every attack that was tried and scored failed. That is a statement about these attacks, not a proof."


def _level_summary(tried: list[Finding]) -> str:
    if not tried:
        return "No attack at this level could be scored."
    count = sum(f.verdict == "broken" for f in tried)
    if len(tried) == 1:
        opening = f"The one attack {'succeeded' if count else 'failed'}, {tried[0].attack}"
    else:
        opening = f"{count or 'None'} of {len(tried)} attacks succeeded. The furthest, {tried[0].attack}"
    return f"{opening}: {_sentence(tried[0].figures[0])}"


def _sentence(figure: Figure) -> str:
    """A figure in words, with its floors."""
    floors = [("chance", figure.chance), ("in clear", figure.ceiling)]
    known = ", ".join(f"{name} {number(value)}" for name, value in floors if value is not None)
    meaning = figure.meaning.rstrip(".")
    return (
        f"{figure.name} {number(figure.value)}"
        + (f" ({known})." if known else ".")
        + (f" {meaning[:1].upper()}{meaning[1:]}." if meaning else "")
    )


@dataclass(frozen=True)
class _Attack:
    """What is said of an attack once for the whole page."""

    name: str
    knows: str
    tries: str
    control: Finding | None


def _attacks(report: Report) -> list[_Attack]:
    findings = {f.attack: f for run in reversed(report.runs) for f in reversed(run.findings)}
    return [
        _Attack(f.attack, ", ".join(f.knows) or "nothing", f.tries, levels.control_of(report, f.attack))
        for f in sorted(findings.values(), key=lambda f: (LEVELS.index(levels.level_of(f)), f.attack))
    ]


def _tally(report: Report) -> dict[str, int]:
    verdicts = [f.verdict for runs in levels.subjects(report).values() for run in runs for f in run.findings]
    return {verdict: verdicts.count(verdict) for verdict in ("broken", "resisted", "not applicable", "not scored")}


def _threshold(curve: Curve) -> str:
    """From where on it leaks, and to which side."""
    side = "above" if curve.higher_leaks else "below"
    return f"leaks {side} {number(curve.leaks)}" if curve.leaks is not None else ""


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"


def _unique(slug: str, taken: set[str]) -> str:
    """``slug``, or the first numbered one that is free; taken from then on."""
    candidates: Iterable[str] = (slug if i == 1 else f"{slug}-{i}" for i in range(1, len(taken) + 2))
    free = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(free)
    return free


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

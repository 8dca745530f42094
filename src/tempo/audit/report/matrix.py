"""The threat matrix in the documentation, made from an audit's report so that the two cannot drift apart.

Tables stand between ``<!-- audit:NAME -->`` and ``<!-- /audit:NAME -->`` in ``threat-model.md`` and ``schemes/*.md``.
NAME is a scheme, for all about it, or ``schemes``, for one column for each. Write them with
``python -m tempo.audit.report.matrix DOCS REPORT.json``.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tempo.audit.attack import Figure, Finding
from tempo.audit.report import levels
from tempo.audit.report.contents import Report, Run, read
from tempo.audit.report.levels import LEVELS, Level, number
from tempo.errors import AuditError

SUMMARY = "schemes"
HIDES = "nothing"
"""By proof. No scheme of this version has one; the first that does will have to say what."""

ACTIVE = "wrong answers are refused, whatever the scheme (`verify`)"
"""Not the audit's to measure: benchmarks/verify is."""

_MARKED = re.compile(r"(?P<start><!-- audit:(?P<name>\S+) -->\n).*?(?P<end><!-- /audit:(?P=name) -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- /?audit:\S* -->")


def update(docs: Path, report: Report, check: bool) -> list[Path]:
    """Write the tables into the documentation's pages.

    Args:
        docs: The folder of the documentation.
        report: What an audit found.
        check: Compare only.

    Returns:
        Files that were rewritten or, with ``check``, that differ.

    Raises:
        AuditError: A marker has no counterpart, or names a scheme that the report does not have.
    """
    changed = []
    for file in [docs / "threat-model.md", *sorted((docs / "schemes").glob("*.md"))]:
        text = file.read_text(encoding="utf-8")
        if len(_MARKER.findall(text)) != 2 * len(_MARKED.findall(text)):
            raise AuditError(f"{file}: each <!-- audit:NAME --> needs a <!-- /audit:NAME --> of the same name after it")
        made = _MARKED.sub(partial(_filled, report=report, file=file), text)
        if made != text:
            changed.append(file)
            if not check:
                file.write_text(made, encoding="utf-8")
    return changed


def _filled(found: re.Match[str], report: Report, file: Path) -> str:
    name = found["name"]
    subjects = levels.subjects(report)
    if name == SUMMARY:
        table = summary(report)
    else:
        own = {title: runs for title, runs in subjects.items() if runs[0].scheme == name}
        if not own:
            known = ", ".join(sorted({run.scheme for runs in subjects.values() for run in runs})) or "none"
            raise AuditError(
                f"{file}: the report has nothing about {name!r}; it has: {known}. Audit it, or take the marker out"
            )
        table = "\n".join(_scheme(report, title, runs, named=len(own) > 1) for title, runs in own.items())
    return f"{found['start']}\n{table}\n{found['end']}"


@dataclass
class _Notes:
    """Footnotes of one table; the same text has one number."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"

    def lines(self) -> list[str]:
        return [f"{place}. {text}" for place, text in enumerate(self.texts, 1)]


def summary(report: Report) -> str:
    """A row for each level of knowledge, a column for each scheme."""
    subjects, notes = levels.subjects(report), _Notes()
    rows = [["the worker knows", *(_code(title) for title in subjects)]]
    rows += [
        [level.title, *(_summary_cell(report, runs, level, notes) for runs in subjects.values())] for level in LEVELS
    ]
    rows.append(["lies (active)", *[ACTIVE] * len(subjects)])
    return "\n".join([_table(rows), "", *notes.lines(), "", _measured(report), ""])


def _summary_cell(report: Report, runs: list[Run], level: Level, notes: _Notes) -> str:
    stands = levels.standing(runs, level)
    if stands.decisive is None:
        return {"untried": "not tried", "not applicable": "no attack applied"}.get(stands.verdict, stands.verdict)
    if stands.inherited:
        return f"**broken**, as with {stands.since.title}" if stands.since else "no further attack"
    _, finding = stands.decisive
    mark = notes.mark(_note(report, runs, finding))
    figure = f"{_code(finding.attack)} {number(finding.figures[0].value)}{mark}"
    if stands.verdict == "broken":
        return f"**broken**: {figure}"
    return f"resists {figure}" + (f", furthest of {stands.tried}" if stands.tried > 1 else "")


def _scheme(report: Report, title: str, runs: list[Run], named: bool) -> str:
    """A row for each level, with all attacks that it adds."""
    notes = _Notes()
    rows = [["the worker knows", "hides", "resists", "broken by"]]
    for level in LEVELS:
        worst = _worst(runs, level)
        cells = [
            "<br>".join(
                f"{_code(f.attack)} {number(f.figures[0].value)}{notes.mark(_note(report, runs, f))}"
                for f in worst
                if f.verdict == verdict
            )
            for verdict in ("resisted", "broken")
        ]
        if not worst:
            cells = ["no attack applied" if any(levels.within(run, level) for run in runs) else "not tried", ""]
        rows.append([level.title, HIDES, cells[0] or "—", f"**{cells[1]}**" if cells[1] else "—"])
    rows.append(["lies (active)", HIDES, ACTIVE, "—"])
    head = [f"{_code(title)}:", ""] if named else []
    return "\n".join([*head, _table(rows), "", *notes.lines(), "", _measured(report), ""])


def _worst(runs: list[Run], level: Level) -> list[Finding]:
    """Each attack that begins at ``level``, where it got furthest; these first that got furthest."""
    found: dict[str, Finding] = {}
    for run in runs:
        for finding in levels.at(run, level):
            if finding.verdict in ("broken", "resisted") and finding.figures:
                best = found.setdefault(finding.attack, finding)
                if _rank(finding) > _rank(best):
                    found[finding.attack] = finding
    return sorted(found.values(), key=_rank, reverse=True)


def _rank(finding: Finding) -> tuple[bool, float]:
    return finding.verdict == "broken", levels.progress(finding.figures[0])


def _note(report: Report, runs: list[Run], finding: Finding) -> str:
    """Which figure it is, between which floors, on which model, and what the attack reaches where it must succeed."""
    figure = finding.figures[0]
    scored = [(run, f) for run in runs for f in run.findings if f.attack == finding.attack and f.figures]
    run = next(run for run, f in scored if f is finding)
    broken = sum(f.verdict == "broken" for _, f in scored)
    control = levels.control_of(report, finding.attack)
    parts = [
        f"{_code(finding.attack)}: {_plain(figure.name)} = {number(figure.value)}",
        *([f"chance {number(figure.chance)}"] if figure.chance is not None else []),
        *([f"in clear {number(figure.ceiling)}"] if figure.ceiling is not None else []),
        *([_from(figure)] if figure.leaks is not None else []),
        *([_controlled(control.figures[0], figure)] if control and control.figures else []),
        f"{_plain(run.title)}, {_origin(run)}",
        *([f"broken in {broken} of {len(scored)}"] if len(scored) > 1 else []),
    ]
    return "; ".join(parts) + "."


def _controlled(control: Figure, figure: Figure) -> str:
    name = "" if control.name == figure.name else f"{_plain(control.name)} "
    return f"its control {name}{number(control.value)}"


def _from(figure: Figure) -> str:
    return f"a leak from {number(figure.leaks or 0.0)} {'up' if figure.higher_leaks else 'down'}"


def _origin(run: Run) -> str:
    drift = "" if run.drift is None else f" at a drift of {run.drift:.1%}"
    return {"secret": "secret initial weights", "public": f"public base{drift}", "unknown": "unknown origin"}[run.base]


def _measured(report: Report) -> str:
    machine = ", ".join(f"{_plain(name)} {_plain(value)}" for name, value in report.machine.items() if name != "date")
    date = _plain(report.machine.get("date", "at an unknown date"))
    return (
        f"Measured {date} ({machine or 'unknown machine'}; effort {_plain(report.effort)}) by "
        f"{_code(report.command) if report.command else 'an unknown command'}. *Resists* is about these attacks, on "
        "these models; it is no proof."
    )


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _plain(text: str) -> str:
    """``text`` as Markdown that shows it as it is, in a table too."""
    escaped = re.sub(r"[\\`|*_\[\]]", r"\\\g<0>", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    return " ".join(escaped.split())


def _code(text: str) -> str:
    """``text`` as a Markdown code span, in a table too."""
    shown = " ".join(text.split()).replace("`", "'").replace("|", "\\|").replace("<!--", "<! --")
    return f"`{shown or ' '}`"


if __name__ == "__main__":
    for rewritten in update(Path(sys.argv[1]), read(Path(sys.argv[2])), check=False):
        sys.stdout.write(f"{rewritten}\n")

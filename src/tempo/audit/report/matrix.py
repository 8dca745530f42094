"""The threat matrix in the documentation, made from an audit's report so that the two cannot drift apart.

Tables stand between ``<!-- audit:NAME -->`` and ``<!-- /audit:NAME -->`` in ``threat-model.md`` and ``schemes/*.md``.
NAME is a scheme, for all about it, or ``schemes``, for one column for each. A scheme that several operators were
audited under has its own kind of table: each operator's figures beside those of all together and of a simulator. Write
them with
``python -m tempo.audit.report.matrix DOCS REPORT.json``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tempo.audit.attack import Figure, Finding
from tempo.audit.report import levels
from tempo.audit.report.contents import Made, Report, Run, read
from tempo.audit.report.levels import LEVELS, Level, number
from tempo.errors import AuditError

SUMMARY = "schemes"
HIDES = "nothing"
"""By proof: of schemes that show a worker everything."""

PROVEN = "**hides** all rows, [by proof](schemes/split.md#statement)"
"""Of schemes that hide from operators by themselves."""

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
        several = [run for runs in own.values() for run in runs if run.attacker]
        if not own:
            known = ", ".join(sorted({run.scheme for runs in subjects.values() for run in runs})) or "none"
            raise AuditError(
                f"{file}: the report has nothing about {name!r}; it has: {known}. Audit it, or take the marker out"
            )
        table = (
            _attackers(report, several)
            if several
            else "\n".join(_scheme(report, title, runs, named=len(own) > 1) for title, runs in own.items())
        )
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
    notes = _Notes()
    # A simulator is no attacker: what is found on its view is the floor of what is found on others.
    subjects = {title: runs for title, runs in levels.subjects(report).items() if runs[0].attacker != "a simulator"}
    rows = [["the worker knows", *(_code(title) for title in subjects)]]
    rows += [
        [level.title, *(_summary_cell(report, runs, level, notes) for runs in subjects.values())] for level in LEVELS
    ]
    rows.append(["lies (active)", *[ACTIVE] * len(subjects)])
    shown = [run for runs in subjects.values() for run in runs]
    return "\n".join([_table(rows), "", *notes.lines(), "", _measured(report, shown), ""])


def _summary_cell(report: Report, runs: list[Run], level: Level, notes: _Notes) -> str:
    stands = levels.standing(runs, level)
    if stands.decisive is None:
        return {"untried": "not tried", "not applicable": "no attack applied"}.get(stands.verdict, stands.verdict)
    proven = f"{PROVEN}; " if runs[0].attacker == "each operator" else ""
    if stands.inherited:
        return f"**broken**, as with {stands.since.title}" if stands.since else f"{proven}no further attack"
    _, finding = stands.decisive
    mark = notes.mark(_note(report, runs, finding))
    figure = f"{_code(finding.attack)} {number(finding.figures[0].value)}{mark}"
    if stands.verdict == "broken":
        return f"**broken**: {figure}"
    return f"{proven}resists {figure}" + (f", furthest of {stands.tried}" if stands.tried > 1 else "")


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
    return "\n".join([*head, _table(rows), "", *notes.lines(), "", _measured(report, runs), ""])


def _attackers(report: Report, runs: list[Run]) -> str:
    """For each model a row for each attack, with a column for each view that it was tried on."""
    parts = []
    for title in dict.fromkeys(run.title for run in runs):
        same = [run for run in runs if run.title == title]
        columns = [(run, worker) for run in same for worker in sorted({f.worker for f in run.findings})]
        views = [{f.attack: f for f in run.findings if f.worker == worker} for run, worker in columns]
        rows = [["attack", "the attacker knows", "figure", "a leak", *map(_whose, columns), "its control"]]
        for attack in dict.fromkeys(f.attack for run in same for f in run.findings):
            found = [view.get(attack) for view in views]
            scored = next((f for f in found if f and f.figures), None)
            if scored:
                control, figure = levels.control_of(report, attack), scored.figures[0]
                about = [_code(attack), ", ".join(scored.knows) or "nothing", _plain(figure.name), _from(figure)]
                rows.append([*about, *map(_reached, found), _reached(control)])
        offloaded = "" if same[0].offloaded is None else f", {same[0].offloaded:.0%} of the layers' FLOPs out"
        head = f"{_plain(title)}, {_origin(same[0])}{offloaded}; **bold** is a leak:"
        parts += [head, "", _table(rows), "", *_idle(views[0].values()), ""]
    return "\n".join([*parts, _measured(report, runs), ""])


def _whose(column: tuple[Run, str]) -> str:
    """A view, in a table's head."""
    run, worker = column
    return _plain(worker.rpartition("@")[2] if run.attacker == "each operator" else run.attacker)


def _reached(finding: Finding | None) -> str:
    if finding is None or not finding.figures:
        return "—"
    value = number(finding.figures[0].value)
    return f"**{value}**" if finding.verdict == "broken" else value


def _idle(findings: Iterable[Finding]) -> list[str]:
    """Attacks that had nothing to work on, by why."""
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        if finding.verdict == "not applicable":
            reasons.setdefault(finding.reason, []).append(_code(finding.attack))
    lines = [f"* {_plain(reason)}: {', '.join(attacks)}" for reason, attacks in reasons.items()]
    return ["Do not apply:", "", *lines] if lines else []


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
        *([f"a leak {_from(figure)}"] if figure.leaks is not None else []),
        *([_controlled(control.figures[0], figure)] if control and control.figures else []),
        f"{_plain(run.title)}, {_origin(run)}",
        *([f"broken in {broken} of {len(scored)}"] if len(scored) > 1 else []),
    ]
    return "; ".join(parts) + "."


def _controlled(control: Figure, figure: Figure) -> str:
    name = "" if control.name == figure.name else f"{_plain(control.name)} "
    return f"its control {name}{number(control.value)}"


def _from(figure: Figure) -> str:
    return f"from {number(figure.leaks or 0.0)} {'up' if figure.higher_leaks else 'down'}"


def _origin(run: Run) -> str:
    drift = "" if run.drift is None else f" at a drift of {run.drift:.1%}"
    return {"secret": "secret initial weights", "public": f"public base{drift}", "unknown": "unknown origin"}[run.base]


def _measured(report: Report, runs: list[Run]) -> str:
    parts: dict[str, list[str]] = {}
    for run in runs:
        parts.setdefault(_made(report, run), []).append(_code(run.scheme))
    (first, _), *others = parts.items()
    elsewhere = "".join(f"; {', '.join(dict.fromkeys(schemes))} {made}" for made, schemes in others)
    return f"Measured {first}{elsewhere}. *Resists* is about these attacks, on these models; it is no proof."


def _made(report: Report, run: Run) -> str:
    """Date, machine, effort and command."""
    made = run.made or Made(command=report.command, machine=report.machine)
    machine = ", ".join(f"{_plain(name)} {_plain(value)}" for name, value in made.machine.items() if name != "date")
    date = _plain(made.machine.get("date", "at an unknown date"))
    return (
        f"{date} ({machine or 'unknown machine'}; effort {_plain(report.effort)}) by "
        f"{_code(made.command) if made.command else 'an unknown command'}"
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

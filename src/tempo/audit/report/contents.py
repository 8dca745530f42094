"""What an audit found, as JSON: the one source of the HTML page and of the threat matrix in the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from tempo.audit.attack import Curve, Finding
from tempo.errors import AuditError
from tempo.settings import Settings

VERSION = 1

Attacker = Literal["", "each operator", "all operators together", "a simulator"]
"""Whose view was attacked: a worker's alone; or, of a scheme that hides from operators by themselves, each one's, that
of all who put together what they have, and one made up without anything that was sent."""

CONTROL = "control"
"""The scheme that a run of positive controls names: what attacks are known to break, not a subject of the audit."""


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """How a run was made."""

    command: str
    machine: dict[str, str]
    """Hardware, versions and date."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One transcript under attack."""

    title: str
    """What was trained, in a few words."""

    scheme: str
    settings: dict[str, str]
    """Settings of the session that differ from the defaults."""

    attacker: Attacker = ""
    base: Literal["secret", "public", "unknown"]
    """Whether training started from weights that the attacker may know."""

    drift: float | None = None
    """``‖W − W_base‖ / ‖W_base‖`` at the last step, over the layers that went out; None without a base."""

    offloaded: float | None = None
    """Share of the layers' forward FLOPs that went out. An audit of nothing finds nothing."""

    facts: list[str]
    """What the attacker knew: ``architecture``, ``base``, ``data``."""

    findings: list[Finding]

    made: Made | None = None
    """None: as the report says."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Runs side by side, and curves that belong to none of them."""

    runs: list[Run]
    curves: list[Curve] = []
    command: str = ""
    effort: str = "quick"
    machine: dict[str, str] = {}
    seconds: float = 0.0
    version: int = VERSION


def write(report: Report, file: Path) -> None:
    """Write ``report`` as JSON, indented, so that changes show line by line."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def read(file: Path) -> Report:
    """Read a report.

    Raises:
        AuditError: It is missing, damaged or of another version.
    """
    try:
        report = msgspec.json.decode(file.read_bytes(), type=Report)
    except OSError as error:
        raise AuditError(f"{file}: {error.strerror}; make it with: tempo audit --json {file} ...") from None
    except msgspec.DecodeError as error:
        raise AuditError(f"{file} is not an audit's report: {error}") from None
    if report.version != VERSION:
        raise AuditError(f"{file} has version {report.version}; this version of Tempo reads {VERSION}")
    return report


def merged(reports: list[Report]) -> Report:
    """Several reports as one. Controls are kept once; machine and effort are the first one's, and runs made on another
    machine say so.
    """
    first, runs = reports[0], [run for report in reports for run in _placed(report, reports[0].machine)]
    commands = [report.command for report in reports if report.command and report.machine == first.machine]
    controls = [run for run in runs if run.scheme == CONTROL]
    return msgspec.structs.replace(
        first,
        runs=[run for run in runs if run.scheme != CONTROL] + controls[-1:],
        curves=[curve for report in reports for curve in report.curves],
        command=" && ".join(dict.fromkeys(commands)),
        seconds=sum(report.seconds for report in reports),
    )


def _placed(report: Report, machine: dict[str, str]) -> list[Run]:
    """Runs that say how they were made, if that was not on ``machine``."""
    if report.machine == machine:
        return report.runs
    made = Made(command=report.command, machine=report.machine)
    return [msgspec.structs.replace(run, made=run.made or made) for run in report.runs]


def differing(settings: Settings) -> dict[str, str]:
    """Fields of ``settings`` that are not at their defaults, as text; the scheme left out."""
    defaults = Settings()
    return {
        name: str(getattr(settings, name))
        for name in Settings.__struct_fields__
        if name != "scheme" and getattr(settings, name) != getattr(defaults, name)
    }

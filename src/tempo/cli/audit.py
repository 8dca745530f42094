"""``tempo audit``."""

from __future__ import annotations

import gc
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tempo.audit import auditing, rehearsal, shares, transcript
from tempo.audit.attack import Effort, Finding
from tempo.audit.controls import running
from tempo.audit.given import Given
from tempo.audit.report import contents, levels
from tempo.audit.report.contents import Attacker, Report, Run
from tempo.audit.transcript import View
from tempo.bench.measure import machine
from tempo.cli.options import Overrides, overrides
from tempo.errors import SettingsError
from tempo.recipes import recipe as recipes

Tell = Callable[[str], None]

if TYPE_CHECKING:
    from tempo.recipes.recipe import Recipe


def audit(
    recording: Annotated[
        Path | None,
        typer.Argument(metavar="[TRANSCRIPT]", help="The transcript of one session.", show_default=False),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Train by this recipe, record, and attack, instead.", show_default=False)
    ] = None,
    knows: Annotated[
        str, typer.Option(help="What the attacker knows: architecture[=RECIPE],base=CHECKPOINT,data=SOURCE.")
    ] = "",
    truth: Annotated[
        list[Path] | None,
        typer.Option(help="To score by: the victim's checkpoint, the folder of insecure_record_truth, or both."),
    ] = None,
    scheme: Annotated[list[str] | None, typer.Option(help="With --run: schemes to audit, in turn.")] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="With --run: secret and/or public initial weights.", show_default="both")
    ] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Only this attack; may be repeated.")] = None,
    full: Annotated[bool, typer.Option("--full/--quick", help="As long as it takes, or minutes.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="With --run: workers, each of another operator.")] = 1,
    settings: Overrides = None,
    json: Annotated[Path | None, typer.Option(help="Write the findings here.", show_default=False)] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write the report here.", show_default=False)] = None,
    merge: Annotated[
        list[Path] | None, typer.Option(help="Put the findings of these earlier --json files first.")
    ] = None,
    control: Annotated[
        bool, typer.Option("--controls/--no-controls", help="With --run: what each attack is known to break, too.")
    ] = True,
) -> None:
    """Attack what a worker recorded, and say what it learned."""
    console = Console()
    effort: Effort = "full" if full else "quick"
    started = time.perf_counter()
    auditing.chosen(attack or ())
    if (recording is None) == (run is None) and not merge:
        raise SettingsError("audit: give either a TRANSCRIPT or --run RECIPE")
    runs: list[Run] = []
    with console.status("") as status:
        tell = status.update if console.is_terminal else console.print
        if run is not None:
            recipe = recipes.load(run, overrides(settings, None))
            runs = _rehearse(recipe, scheme or [], origin or [], attack or [], effort, workers, tell)
            if control:
                tell("controls")
                runs.append(running.run(attack or ()))
        elif recording is not None:
            runs = [_attack_recording(recording, Given.parse(knows), truth or [], attack or [], effort, tell)]
    report = Report(
        runs=runs,
        command=shlex.join(["tempo", *sys.argv[1:]]),
        effort=effort,
        machine=machine(),
        seconds=time.perf_counter() - started,
    )
    report = contents.merged([*map(contents.read, merge or ()), *([report] if runs else [])])
    if json is not None:
        contents.write(report, json)
    for single in report.runs:
        console.print(_table(single))
    if page is not None:
        from tempo.audit.report import html

        page.write_text(html.page(report), encoding="utf-8")
        console.print(f"report: {page}", soft_wrap=True, highlight=False)


def _rehearse(
    recipe: Recipe,
    schemes: list[str],
    origins: list[str],
    attacks: list[str],
    effort: Effort,
    workers: int,
    tell: Tell,
) -> list[Run]:
    for name in origins:
        if name not in rehearsal.ORIGINS:
            raise SettingsError(f"audit: --origin is secret or public, not {name!r}")
    whole = rehearsal.Rehearsal(recipe, effort, tell)
    runs = []
    for origin in rehearsal.ORIGINS:
        if origins and origin not in origins:
            continue
        start = whole.start(origin)
        for scheme in schemes or [recipe.session.scheme]:
            if origin == "secret" and rehearsal.publishes(recipe, scheme):
                tell(f"scheme {scheme} is for public weights only")
                continue
            # Each scheme as it is, also where another preset would be chosen: what that one saves must be seen.
            done = whole.record(start, rehearsal.session_settings(recipe, scheme), workers, preset_for="secret")
            views: dict[Attacker, list[View]] = {"": done.views}
            if rehearsal.publishes(recipe, scheme):
                views = shares.attackers(done.views)
            for attacker, seen in views.items():
                findings = auditing.attack(seen, done.knowledge, done.truth, attacks, effort, tell)
                runs.append(
                    Run(
                        title=f"{recipe.model.__struct_config__.tag} on {recipe.data.source}",
                        scheme=scheme,
                        attacker=attacker,
                        settings=contents.differing(rehearsal.session_settings(recipe, scheme)),
                        base=origin,
                        drift=done.drift,
                        offloaded=done.offloaded,
                        facts=sorted(done.knowledge.facts),
                        findings=findings,
                    )
                )
            del done, views, seen
            gc.collect()  # sessions are cycles, and their recordings large
    return runs


def _attack_recording(
    folder: Path, given: Given, truths: list[Path], attacks: list[str], effort: Effort, tell: Tell
) -> Run:
    views = transcript.read(folder)
    truth = given.truth(truths)
    knowledge = given.knowledge()
    findings = auditing.attack(views, knowledge, truth, attacks, effort, tell)
    return Run(
        title=folder.name,
        scheme=given.scheme(truths),
        settings={},
        base="public" if knowledge.base is not None else "unknown",
        facts=sorted(knowledge.facts),
        findings=findings,
    )


def _table(run: Run) -> Table:
    """One line for each finding."""
    drift = "" if run.drift is None else f", drift {run.drift:.1%}"
    idle = ", ".join(finding.attack for finding in run.findings if finding.verdict == "not applicable")
    table = Table(
        title=f"{levels.subject(run)}: {run.title}, from {run.base} weights{drift}",
        caption=f"not applicable (--json says why): {idle}" if idle else None,
    )
    for column in ("attack", "attacker knows", "verdict", "figure", "chance"):
        table.add_column(column)
    table.add_column("value", justify="right")
    for finding in run.findings:
        if finding.verdict != "not applicable":
            table.add_row(*_line(finding))
    return table


def _line(finding: Finding) -> tuple[str, ...]:
    knows = ", ".join(finding.knows) or "nothing"
    where = f"{finding.attack} ({finding.worker})" if finding.worker.startswith("lab:1") else finding.attack
    if not finding.figures:
        return where, knows, finding.verdict, finding.reason, "", ""
    figure = finding.figures[0]
    colour = "red" if finding.verdict == "broken" else "green"
    chance = "" if figure.chance is None else f"{figure.chance:.3g}"
    return where, knows, f"[{colour}]{finding.verdict}[/]", figure.name, chance, f"{figure.value:.3g}"

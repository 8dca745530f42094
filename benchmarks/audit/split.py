"""Attacks on what each worker sees under scheme `split`, beside a simulated view, and beside both workers' together.

A vision transformer is trained on one part of the digits (the public base); adapters beside its frozen layers are
trained on another (the secret). The simulator's view is made of uniform numbers, without any of what was sent: what
attacks reach on it is their floor. Both views together are the positive control. Usage:

    OMP_NUM_THREADS=1 python benchmarks/audit/split.py split.json
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec
import torch

from tempo.audit import auditing, rehearsal
from tempo.audit.report.contents import Report, Run, differing, write
from tempo.audit.shares import simulated, together
from tempo.bench.measure import machine
from tempo.recipes import recipe

RECIPE = Path(__file__).parents[2] / "examples" / "audit_vit.toml"
BATCH = 16


def table(runs: list[Run]) -> list[list[str]]:
    """Every attack that applies: its figure, from where on it counts as a leak, and what it reached; bold is a leak."""
    rows = [["attack", "figure", "a leak from", *(run.title for run in runs)]]
    for attack in zip(*(run.findings for run in runs), strict=True):
        if any(finding.figures for finding in attack):
            figure = next(finding.figures[0] for finding in attack if finding.figures)
            leaks = f"{figure.leaks:.2g} {'up' if figure.higher_leaks else 'down'}"
            reached = [f"{finding.figures[0].value:.2g}" if finding.figures else "-" for finding in attack]
            marked = [f"**{r}**" if f.verdict == "broken" else r for r, f in zip(reached, attack, strict=True)]
            rows.append([f"`{attack[0].attack}`", figure.name, leaks, *marked])
    return rows


def main(target: Path) -> None:
    torch.set_num_threads(1)
    begun = time.perf_counter()
    loaded = recipe.load(RECIPE, [f"data.batch_size={BATCH}"])
    whole = rehearsal.Rehearsal(loaded, "quick", print)
    settings = rehearsal.session_settings(loaded, "split", base="public")
    done = whole.record(whole.start("public"), settings)
    first, second = sorted(done.views, key=lambda view: view.worker)
    subjects = {"operator 0": first, "operator 1": second, "the simulator": simulated(first)}
    subjects["both operators together"] = together([first, second])
    runs = []
    for title, view in subjects.items():
        findings = auditing.attack([view], done.knowledge, done.truth, report=print)
        runs.append(
            Run(
                title=title,
                scheme="split",
                settings=differing(settings),
                base="public",
                drift=done.drift,
                offloaded=done.offloaded,
                facts=sorted(done.knowledge.facts),
                findings=[msgspec.structs.replace(finding, panels=[], curves=[]) for finding in findings],
            )
        )
    for row in table(runs):
        print(f"| {' | '.join(row)} |")
    command = "python benchmarks/audit/split.py split.json"
    write(Report(runs=runs, command=command, machine=machine(), seconds=time.perf_counter() - begun), target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

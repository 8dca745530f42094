"""``tempo profile``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch's profiler would tell of its beginning and end; read at import

from tempo.bench.measure import machine
from tempo.cli.options import Overrides, Plain, Workers, overrides
from tempo.profile import chrome, figure, summary
from tempo.profile.accounts import account
from tempo.recipes import recipe as recipes
from tempo.recipes.profiling import profile as run


def profile(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.", show_default=False)],
    settings: Overrides = None,
    workers: Workers = None,
    scheme: Annotated[str | None, typer.Option(help="Masking scheme.", show_default="the recipe's")] = None,
    step: Annotated[int, typer.Option(min=1, help="The step to record; those before it warm up.")] = 4,
    out: Annotated[Path, typer.Option(help="Where to write the trace; its summary goes beside it, as .md.")] = Path(
        "trace.json"
    ),
    figure_file: Annotated[
        Path | None, typer.Option("--figure", help="Draw the step here, as SVG.", show_default=False)
    ] = None,
    plain: Plain = False,
    insecure_no_tls: Annotated[
        bool, typer.Option("--insecure-no-tls", help="Speak to remote workers in clear.")
    ] = False,
) -> None:
    """Take a few steps by a recipe and record one: where its time goes, here, on the wire and on workers."""
    console = Console()
    changes = overrides(settings, workers)
    if scheme is not None:
        changes.append(f"session.scheme={scheme}")
    if insecure_no_tls:
        changes.append("session.insecure_no_tls=true")
    job = recipes.load(recipe, changes)
    with console.status("") as status:
        recording, unrecorded = run(job, step, status.update, plain=plain)
    accounts = account(recording)
    masks = "plain" if plain else f"scheme {job.session.scheme}"
    title = f"Step {step} of {recipe.name}, {masks}: {recording.duration / 1e6:,.0f} ms"
    about = {"recipe": recipe.name, "step": str(step), "masks": masks, "placement": job.session.placement, **machine()}
    if unrecorded:
        about["the step before, not recorded"] = f"{unrecorded[-1] * 1000:,.0f} ms"
    chrome.write(out, recording, accounts, about)
    page = summary.page(accounts, title, about)
    text = out.with_suffix(".md")
    text.write_text(page.markdown(), encoding="utf-8")
    console.print(page.terminal())
    written = [f"trace: {out} (open it in https://ui.perfetto.dev)", f"summary: {text}"]
    if figure_file is not None:
        figure.draw(figure_file, recording, accounts, title)
        written.append(f"figure: {figure_file}")
    console.print("\n".join(written), soft_wrap=True, highlight=False)

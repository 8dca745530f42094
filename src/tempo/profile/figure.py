"""The figure of a step: who did what when, and where the time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tempo.profile.accounts import GROUPS, Accounts, stretches
from tempo.profile.recording import Recording

_COLUMNS: Final = 1200
"""How finely the figure shows time: each column has the colour of what filled most of it."""

_INK: Final = "#22303c"
_PALE: Final = "#75838f"
_COLOURS: Final = {
    "masks": "#0b6e99",
    "checks": "#7d53a8",
    "wire": "#c99a1d",
    "waiting for workers": "#e3e8ec",
    "engine": "#5f7f8f",
    "trusted layers": "#3a8f5c",
    "loss, optimizer, data": "#a5c9a0",
    "the rest": "#b9a99a",
    "computing, as it says": "#d9601a",
}


def draw(file: Path, recording: Recording, accounts: Accounts, title: str) -> None:
    """Draw ``file``, an SVG or PNG.

    Args:
        file: What to write.
        recording: The step.
        accounts: Its sums.
        title: What was recorded, and where.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows: list[tuple[str, list[tuple[int, int, str]]]] = [
        ("trusted process", [(it.start, it.end, GROUPS[it.kind]) for it in stretches(recording, accounts.workers)])
    ]
    for worker, computing in accounts.workers.items():
        rows.append((f"worker\n{worker}", [(c.start, c.end, "computing, as it says") for c in computing]))
    style = {"font.size": 9, "text.color": _INK, "svg.hashsalt": "tempo", "axes.edgecolor": "#c3ccd4"}
    with mpl.rc_context({**style, "xtick.color": _PALE, "ytick.color": _INK}):
        figure = Figure(figsize=(9.5, 1.9 + 0.55 * len(rows)), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        timeline, total = figure.subplots(2, 1, height_ratios=(len(rows), 1.1))
        _timeline(timeline, rows, recording.duration)
        timeline.set_xlabel("ms", loc="right", fontsize=8.5, color=_PALE)
        _total(total, accounts)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        names = [name for name, spent in accounts.groups().items() if spent]
        names += ["computing, as it says"] if accounts.workers else []
        handles = [mpl.patches.Patch(facecolor=_COLOURS[name], label=name) for name in names]
        figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize=8.5)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _timeline(axes: Any, rows: Sequence[tuple[str, list[tuple[int, int, str]]]], duration: int) -> None:
    for row, (_, stretches_) in enumerate(rows):
        for start, end, name in _columns(stretches_, duration):
            axes.barh(row, (end - start) / 1e6, left=start / 1e6, height=0.8, color=_COLOURS[name], linewidth=0)
    axes.set(yticks=range(len(rows)), yticklabels=[name for name, _ in rows], xlim=(0, duration / 1e6))
    axes.invert_yaxis()
    axes.tick_params(length=0, labelsize=8.5)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)


def _columns(spans: Sequence[tuple[int, int, str]], duration: int) -> list[tuple[float, float, str]]:
    """At most `_COLUMNS` of them, neighbours of one colour together."""
    width = duration / _COLUMNS
    filled: list[Counter[str]] = [Counter() for _ in range(_COLUMNS)]
    for start, end, name in spans:
        first, last = int(start / width), min(_COLUMNS - 1, int(end / width))
        for column in range(first, last + 1):
            filled[column][name] += round(min(end, (column + 1) * width) - max(start, column * width))
    merged: list[tuple[float, float, str]] = []
    for column, counts in enumerate(filled):
        name, most = counts.most_common(1)[0] if counts else ("", 0)
        if most < width / 2 and counts.total() < width / 2:
            continue
        if merged and merged[-1][2] == name and merged[-1][1] == column * width:
            merged[-1] = merged[-1][0], (column + 1) * width, name
        else:
            merged.append((column * width, (column + 1) * width, name))
    return merged


def _total(axes: Any, accounts: Accounts) -> None:
    left = 0.0
    for name, spent in accounts.groups().items():
        share = 100 * spent / accounts.duration
        axes.barh(0, share, left=left, height=0.8, color=_COLOURS[name], linewidth=0)
        if share >= 4:
            dark = name not in ("waiting for workers", "loss, optimizer, data", "the rest")
            axes.text(left + share / 2, 0, f"{share:.0f}%", ha="center", va="center", color="white" if dark else _INK)
        left += share
    axes.set(yticks=[0], yticklabels=["its time in all"], xlim=(0, 100), xticks=[])
    axes.tick_params(length=0, labelsize=8.5)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)

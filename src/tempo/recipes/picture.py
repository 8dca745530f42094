"""The picture at the end of a demonstration: training curves, and inputs beside what a worker received for them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tempo.recipes import metrics
from tempo.recipes.metrics import Evaluation, Record, Step

if TYPE_CHECKING:
    from torch import Tensor

    from tempo.recipes.comparison import Seen

_INK: Final = "#22303c"
_PALE: Final = "#75838f"
_PROTECTED: Final = {"color": "#0b6e99", "linewidth": 3.4, "alpha": 0.5, "label": "protected"}
_PLAIN: Final = {"color": "#d9601a", "linewidth": 1.2, "linestyle": (0, (4, 2)), "label": "plain, same start"}

_STYLE: Final = {
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#c3ccd4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8edf1",
    "xtick.color": _PALE,
    "ytick.color": _PALE,
}


def draw(folder: Path, seen: Seen) -> Path:
    """Draw ``folder/report.png`` of the run there, its plain twin in ``folder/plain``, and what a worker saw."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(13, 6.6), dpi=130, facecolor="white")
        FigureCanvasAgg(figure)
        halves: Any = figure.subfigures(1, 2, width_ratios=(1.08, 1))
        _curves(halves[0], metrics.read(folder), metrics.read(folder / "plain"))
        _inputs(halves[1], seen)
        file = folder / "report.png"
        figure.savefig(file)
    return file


def _curves(figure: Any, protected: list[Record], plain: list[Record]) -> None:
    steps = [[record for record in run if isinstance(record, Step)] for run in (protected, plain)]
    tests = [[record for record in run if isinstance(record, Evaluation)] for run in (protected, plain)]
    gaps = [abs(a.loss - b.loss) for a, b in zip(*steps)]
    final = f"{tests[0][-1].accuracy:.1%} protected, {tests[1][-1].accuracy:.1%} plain"
    _title(
        figure,
        0.105,
        "Protected training follows plain training",
        f"test accuracy {final} · largest loss difference {max(gaps):.1e}",
    )
    grid = {"left": 0.105, "right": 0.955, "top": 0.87, "bottom": 0.09, "hspace": 0.13}
    loss, accuracy, gap = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2.2, 1.6), gridspec_kw=grid)
    for run, evaluations, look in zip(steps, tests, (_PROTECTED, _PLAIN)):
        loss.plot([record.step for record in run], [record.loss for record in run], **look)
        shares = [100 * record.accuracy for record in evaluations]
        accuracy.plot([record.step for record in evaluations], shares, marker="o", markersize=4, **look)
    gap.semilogy([record.step for record in steps[0]], [max(value, 1e-9) for value in gaps], color=_INK, linewidth=0.8)
    loss.set(ylabel="training loss")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False, loc="upper right")
    accuracy.set(ylabel="test accuracy, %")
    gap.set(ylabel="|Δ loss|", xlabel="step", xlim=(0, len(steps[0])))
    equal = "equal losses are drawn at $10^{-9}$"
    gap.text(0.995, 0.97, equal, transform=gap.transAxes, ha="right", va="top", fontsize=8, color=_PALE)
    figure.align_ylabels()


def _inputs(figure: Any, seen: Seen) -> None:
    size = "×".join(map(str, seen.shape))
    what = f"the first operand sent: {size} numbers for each image · scheme {seen.scheme}"
    _title(figure, 0.02, "What a worker gets to see", what)
    grid = {"left": 0.23, "right": 0.97, "top": 0.87, "bottom": 0.15, "wspace": 0.07, "hspace": 0.1}
    axes = figure.subplots(5, len(seen.images), squeeze=False, gridspec_kw=grid)
    rows = (
        ("input", seen.images / 255, _image, _PALE),
        ("its operand, plain", seen.plain, _numbers, _PLAIN["color"]),
        ("image read back\nfrom that", seen.read_plain, _image, _PLAIN["color"]),
        ("what the worker\nreceived instead", seen.received, _numbers, _PROTECTED["color"]),
        ("image read back\nfrom that", seen.read_received, _image, _PROTECTED["color"]),
    )
    for row, (label, pictures, show, colour) in zip(axes, rows):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=10, linespacing=1.35)
        for axis, picture in zip(row, pictures):
            show(axis, picture)
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            for spine in axis.spines.values():
                spine.set(visible=True, color=colour, linewidth=1.2)
    note = (
        "Read back by a linear map fitted on plain operands of training images: what the worker received "
        "cannot be read as it is."
    )
    if seen.scheme == "tempo":
        note += (
            " It is not noise, though: under scheme tempo these are the very same numbers, permuted within "
            "the batch and scaled. The README says what that resists and what not."
        )
    figure.text(0.02, 0.115, textwrap.fill(note, 96), va="top", fontsize=8.5, color=_PALE, linespacing=1.45)


def _title(figure: Any, left: float, title: str, figures: str) -> None:
    figure.text(left, 0.955, title, fontsize=15, fontweight="bold", va="center")
    figure.text(left, 0.907, figures, color=_PALE, va="center")


def _image(axis: Any, image: Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _numbers(axis: Any, operand: Tensor) -> None:
    """Rows and features of an operand as colours."""
    limit = 2.5 * float(operand.std())
    axis.imshow(operand.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")

"""Draw where updates are cheaper, here or on workers, from what `cost.py` measured.

python benchmarks/updates/plot.py COST.json docs/updates.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams |= {"svg.hashsalt": "tempo", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}

import matplotlib.pyplot as plt
import numpy as np

from tempo.engine.update_cost import update_cost

INK = "#7d8590"  # legible on white and on black
COLOURS = {"trusted": INK, 0: "#2a8fd6", 1: "#d9662b", 2: "#3fa34d"}
NAMES = {0: "worker, SGD", 1: "worker, momentum", 2: "worker, Adam (by the model)"}


def megabytes(axes: Any, kept: dict[str, Any]) -> None:
    """Of weights, gradients and states; activations are the same either way."""
    elements, rekey_rows = 12 * kept["width"] ** 2, kept["rekey_rows"]
    rows = np.unique(np.geomspace(256, 16384, 600).astype(int))
    axes.plot(rows, [4e-6 * elements * 2] * len(rows), color=COLOURS["trusted"], label="trusted, any optimizer")
    for states, name in NAMES.items():
        costs = [4e-6 * elements * update_cost(int(T), rekey_rows, states).worker for T in rows]
        axes.plot(rows, costs, color=COLOURS[states], label=name)
    for r in kept["steps"]:
        measured = (r["bytes_up"] + r["bytes_down"] - 4 * 2 * 16 * r["rows"] * kept["width"]) / 1e6
        place = "trusted" if r["update"] == "trusted" else int(r["momentum"] > 0)
        axes.plot(r["rows"], measured, "o", ms=3.5, color=COLOURS[place])
    axes.set(yscale="log", ylabel="MB per step and block, both ways", title="weights and gradients on the wire")
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)


def seconds(axes: Any, kept: dict[str, Any]) -> None:
    """On this side: updates on the worker, relative to updates here."""
    found = {(r["scheme"], r["momentum"], r["update"], r["rows"]): r["trusted_seconds"] for r in kept["steps"]}
    for scheme, style in (("tempo-signed", "--"), ("mix", "-")):
        for states, momentum in enumerate(sorted({r["momentum"] for r in kept["steps"]})):
            rows = sorted(r for s, m, place, r in found if (s, m, place) == (scheme, momentum, "worker"))
            ratio = [found[scheme, momentum, "worker", r] / found[scheme, momentum, "trusted", r] for r in rows]
            label = f"{scheme}, {'momentum' if momentum else 'SGD'}"
            axes.plot(rows, ratio, style, marker="o", ms=3.5, color=COLOURS[states], label=label)
    axes.axhline(1, color=INK, lw=0.8)
    axes.set(ylim=(0, None), ylabel="worker / trusted updates", title="seconds of the trusted side")
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)


def main(source: Path, target: Path) -> None:
    kept = json.loads(source.read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    megabytes(left, kept)
    seconds(right, kept)
    ticks = sorted({r["rows"] for r in kept["steps"]})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{T:,}" for T in ticks])
        axes.minorticks_off()
        axes.set_xlabel("tokens per step")
        axes.tick_params(colors=INK, labelsize=8)
        for part in (axes.xaxis.label, axes.yaxis.label, axes.title):
            part.set_color(INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
    figure.savefig(target, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""What rank of cloak keeps a weight's masks from being linked over a rekey? Attack `rekeying` on a vision transformer.

Its weights live on a worker and are rekeyed every two steps, under gradient descent with momentum; the attacker uses
weight and momentum, or the weight alone, as if there were no momentum. Beside it, trusted updates: masks fresh at every
step, and only weights are sent. Usage:

    OMP_NUM_THREADS=1 python benchmarks/audit/rekeying.py rekeying.json
    OMP_NUM_THREADS=1 python benchmarks/audit/rekeying.py rekeying-plain-sgd.json optimizer.momentum=0.0
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from tempo.audit import rehearsal
from tempo.audit.attack import Curve
from tempo.audit.attacks.gradients_joint import relation
from tempo.audit.attacks.rekeying import link
from tempo.audit.rehearsal import Rehearsed
from tempo.audit.report.contents import Report, write
from tempo.audit.transcript import Rekey
from tempo.bench.measure import machine
from tempo.recipes import recipe as recipes

RANKS = (0, 8, 16, 32, 64)
LAYERS = ("vit.layers.0.attention.o_proj", "vit.layers.0.mlp.fc1", "vit.layers.0.mlp.fc2")
RECIPE = [
    "optimizer.name=sgd", "optimizer.lr=0.05", "optimizer.weight_decay=0.0",
    "session.rekey_rows=2048", "session.insecure_small_blocks=true",
]  # fmt: skip


def linked(done: Rehearsed, names: set[str]) -> float:
    """Mean |cosine| with the true relation of masks of input features, over `LAYERS`, at the last rekey of each."""
    view, found = done.views[0], []
    for layer in view.layers:
        if done.truth.name(layer) in LAYERS:
            rekey = view.rekeys(layer)[-1]
            before = {name: tensor for name, tensor in rekey.before.items() if name in names}
            guess = link(Rekey(before, rekey.after, rekey.calls))
            found.append(relation([guess], done.truth, "").figures[0].value)
    return sum(found) / len(found)


def main(target: Path, *overrides: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    recipe = recipes.load(Path(__file__).parents[2] / "examples" / "audit_vit.toml", [*RECIPE, *overrides])
    used = [("worker", {"w", "momentum_buffer"}), ("worker", {"w"}), ("trusted", {"w"})]
    if not getattr(recipe.optimizer, "momentum", 0.0):
        del used[0]
    whole = rehearsal.Rehearsal(recipe, "quick")
    start = whole.start("secret")
    series: dict[str, list[float | None]] = {}
    for rank in RANKS:
        for update, names in used:
            settings = rehearsal.session_settings(recipe, "mix", update=update, mix_cloak=rank)
            value = linked(whole.record(start, settings, preset_for="secret"), names)
            what = "weight and momentum" if len(names) > 1 else "weight alone"
            series.setdefault(f"update={update}: {what}", []).append(value)
            print(rank, update, what, f"{value:.3f}", flush=True)
    curve = Curve(
        title="Masks linked over a rekey, by rank of the cloak",
        x_label="rank of the cloaks, on weight and momentum",
        y_label="mean |cosine| with the true relation of masks",
        x=[float(rank) for rank in RANKS],
        series=series,
        leaks=0.5,
        note="ViT of width 128, the three layers of its first block that are no attention inputs; `mix` in blocks of "
        "32; chance 0.05 to 0.07. The attacker knows nothing but the transcript.",
    )
    command = " ".join(["python benchmarks/audit/rekeying.py", target.name, *overrides])
    write(Report(runs=[], curves=[curve], command=command, machine=machine()), target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

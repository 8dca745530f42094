"""Cross-layer matching: what leaves one product comes into the next; masks that keep signs and order give it away."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tempo.audit.attack import Attack, Control, Effort, Evidence, Figure, NotApplicable, Outcome
from tempo.audit.controls import victims
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers.matching import CERTAIN, Match, match_unsigned, stacks
from tempo.audit.transcript import Call, View
from tempo.audit.truth import CallTruth, Truth, Which

AHEAD = 3
"""Products after one among which its output is looked for."""

LINKED = 0.5
"""Median correlation of plain channels from which an output and an input count as one thing, in scoring."""

ROWS = 8192
"""Rows above which a pair is left out."""

ALIGNED = 0.9
"""Cosine between the masks' rows from which two masked columns count as one and the same plain column."""


@dataclass(frozen=True)
class Pair:
    """An output and the input it was matched with."""

    source: Call
    target: Call
    match: Match


class CrossLayer(Attack):
    """Matches rows and channels of one product's output with those of the next ones' inputs."""

    name = "cross-layer"
    tries = (
        "Matches rows and channels of each product's masked output with the next one's masked input, by zeros, signs "
        "and ranks (activations and BatchNorm keep them; gradients too). Whoever can has the network in one basis."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Pair]:
        """Of the last step that has a backward pass, and each of its products with the next few."""
        trained = [step for step in view.steps if any(call.g is not None for call in view.at(step))]
        calls = view.at((trained or view.steps)[-1]) if view.steps else []
        pairs: list[Pair] = []
        for ahead in range(1, AHEAD + 1):
            for source, target in zip(calls, calls[ahead:], strict=False):
                certain = [pair for pair in pairs if pair.match.score > CERTAIN]
                given = any(pair.source is source for pair in certain)
                taken = any(pair.target is target for pair in certain)
                if given and taken:
                    continue
                sides = comparable(source, target)
                if sides is not None:
                    pairs.append(Pair(source, target, match_unsigned(*sides)))
        if not pairs:
            raise NotApplicable("no product's output has the shape of a later one's input")
        return pairs

    def score(self, recovered: list[Pair], view: View, truth: Truth) -> Outcome:
        """Share of live channels, and of rows, matched rightly, with the output that fits each input best."""
        linked = _linked(recovered, truth)
        if not linked:
            raise NotApplicable("no product's output goes into a later one by way of element-wise functions alone")
        channels, rows, chance = [], [], []
        for pair in linked:
            live = _live(pair, truth)
            channels.append(_right(pair, truth, ("P", "A"), pair.match.columns)[live])
            rows.append(_right(pair, truth, ("L", "L"), pair.match.rows))
            chance.append(torch.full((int(live.sum()),), 1 / max(pair.target.x.shape[1], 1)))
        return Outcome(
            figures=[
                Figure(
                    name="channels matched",
                    value=float(torch.cat(channels).double().mean()),
                    leaks=0.25,
                    chance=float(torch.cat(chance).mean()),
                    ceiling=1.0,
                    meaning="1 means that the worker knows which channel is which from layer to layer",
                ),
                Figure(
                    name="rows matched",
                    value=float(torch.cat(rows).double().mean()),
                    leaks=0.25,
                    chance=sum(1 / len(r) for r in rows) / len(rows),
                    ceiling=1.0,
                    meaning="1 means that the worker can follow every sample or token through the network",
                ),
                Figure(name="pairs of layers", value=len(linked), meaning="how many such pairs there are"),
            ]
        )

    def control(self) -> Control:
        """A ReLU network under `tempo`."""
        recorded = victims.relu_mlp().record("tempo")
        return Control(
            Evidence(recorded.views[0], Knowledge(), recorded.truth),
            "channels matched",
            0.99,
            "issue: more than 99% of channels of a ReLU MLP under tempo",
        )


def comparable(source: Call, target: Call) -> tuple[list[Tensor], list[Tensor]] | None:
    """What to match of ``source``'s output and ``target``'s input; None where the shapes exclude that they are one.

    Pixels that went out as rows (a 1×1 convolution) are compared with images taken apart into pixels. Maps that were
    pooled on the way are compared after pooling.
    """
    y, g, x, dx = source.y, source.g, target.x, target.dx
    if y is None or x.shape[1] % y.shape[1] or max(len(y), len(x)) > ROWS:
        return None
    if x.dim() != y.dim():
        images, pixels = (x, y) if x.dim() > y.dim() else (y, x)
        if images.dim() != 4 or len(pixels) != len(images) * images.shape[2] * images.shape[3]:
            return None
        y, x = _pixels(y), _pixels(x)
        g, dx = (None if t is None else _pixels(t) for t in (g, dx))
    elif x.shape[2:] != y.shape[2:]:
        if x.dim() != 4 or any(size % pooled for size, pooled in zip(y.shape[2:], x.shape[2:], strict=True)):
            return None
        y, g, dx = nn.functional.adaptive_max_pool2d(y.float(), x.shape[2:]), None, None
    return stacks(y, g, output=True), stacks(x, dx, output=False)


def _pixels(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(0, -2) if x.dim() > 2 else x


def _linked(pairs: list[Pair], truth: Truth) -> list[Pair]:
    """For each input that is some output after element-wise functions, the pair that the attacker believes in."""
    best: dict[int, Pair] = {}
    for pair in pairs:
        if pair.match.score > (best[pair.target.sequence].match.score if pair.target.sequence in best else 0):
            best[pair.target.sequence] = pair
    fed = {pair.target.sequence for pair in pairs if _likeness(pair, truth) > LINKED}
    return [pair for sequence, pair in best.items() if sequence in fed]


def _likeness(pair: Pair, truth: Truth) -> float:
    """Median correlation of the plain output's channels with the plain input's; 0 where they do not compare."""
    y, x = truth.of(pair.source).get("y"), truth.of(pair.target)["x"]
    if y is None or y.shape[1] != x.shape[1]:
        return 0.0
    if y.dim() == x.dim() == 4 and y.shape[2:] != x.shape[2:]:
        y = nn.functional.adaptive_max_pool2d(y.float(), x.shape[2:])
    if y.dim() != x.dim():
        y, x = _pixels(y), _pixels(x)
    if y.shape != x.shape:
        return 0.0
    y, x = (t.double().movedim(1, 0).flatten(1) for t in (y, x))
    y, x = (t - t.mean(1, keepdim=True) for t in (y, x))
    live = x.norm(dim=1) > 0
    if not bool(live.any()):
        return 0.0
    return float(nn.functional.cosine_similarity(y[live], x[live], dim=1).abs().median())


def _live(pair: Pair, truth: Truth) -> Tensor:
    """Which columns of the masked output carry anything on the other side: a dead unit cannot be told from another."""
    x = truth.of(pair.target)["x"].movedim(1, 0).flatten(1)
    alive = x.std(1) > 0
    mask = truth.of(pair.source).mask("P")
    if mask.blocks or len(alive) != len(pair.match.columns):  # of another width: it is not this input at all
        return torch.ones(pair.match.columns.shape, dtype=torch.bool)
    return alive if not mask.gathers else alive[truth.of(pair.source).permutation("P")]


def _right(pair: Pair, truth: Truth, masks: tuple[Which, Which], found: Tensor) -> Tensor:
    """Whether each row or column was matched with its own, by the masks."""
    ours, theirs = (
        _origins(truth.of(call), which, size)
        for call, which, size in zip((pair.source, pair.target), masks, _sizes(pair, masks), strict=True)
    )
    right = torch.zeros(found.shape, dtype=torch.bool)
    kept = found >= 0
    if ours.dim() == theirs.dim() == 1:
        right[kept] = ours[kept] == theirs[found[kept]]
        return right
    ours, theirs = (torch.eye(int(t.max()) + 1).double()[t] if t.dim() == 1 else t for t in (ours, theirs))
    width = min(ours.shape[1], theirs.shape[1])  # shield rows are nothing of the user's
    cosines = nn.functional.cosine_similarity(ours[kept][:, :width], theirs[found[kept]][:, :width], dim=1)
    right[kept] = cosines.abs() > ALIGNED
    return right


def _sizes(pair: Pair, masks: tuple[Which, Which]) -> tuple[int, int]:
    """Rows or columns of the two sides as they were compared."""
    if masks[0] == "L":
        rows = max(len(pair.source.x), len(pair.target.x))
        return rows, rows
    return pair.source.w.shape[0], pair.target.x.shape[1]


def _origins(call: CallTruth, which: Which, size: int) -> Tensor:
    """The plain index of each masked row or column; with blocks, the plain combination that it is."""
    if call.mask(which).blocks:
        matrix = call.matrix(which)
        if which != "L":  # columns of y~ are combinations by P^-1's columns, those of x~ by A^-1's
            inverse: Tensor = torch.linalg.inv(matrix)
            return inverse.T
        pixels = size // len(matrix)
        return matrix if pixels == 1 else torch.kron(matrix, torch.eye(pixels, dtype=matrix.dtype))
    found = call.permutation(which)
    pixels = size // len(found) if which == "L" else 1
    found = (found[:, None] * pixels + torch.arange(pixels)).flatten()
    columns = call.get("columns")
    return found if which != "P" or columns is None else columns.long()[found]

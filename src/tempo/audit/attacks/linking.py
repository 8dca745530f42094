"""Linking over time: a weight found again in the next step's masked weight, fresh masks or not.

Permutations and scales leave signatures, so rows are matched one by one. Rotations leave none of a matrix; but the
taps of a spatial convolution are many matrices under the same two masks, and two steps of them show the rotation from
one pair of masks to the other (see `singular_vectors`): all steps are then as good as masked once.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tempo.audit.attack import Attack, Control, Curve, Effort, Figure, NotApplicable, Outcome
from tempo.audit.attacks.signatures import match, taps
from tempo.audit.attacks.singular_vectors import rotations
from tempo.audit.controls import basecase
from tempo.audit.knowledge import Knowledge
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth
from tempo.wire.messages import Conv

PAIRS: dict[Effort, int] = {"quick": 2, "full": 8}
"""Pairs of steps that are compared, of each product and distance."""

CHANNELS: dict[Effort, int] = {"quick": 128, "full": 512}
"""Of the widest convolution whose rotations are linked."""

LEAKS = 0.25
"""Share of rows: well above chance for any product of a dozen rows or more."""


@dataclass(frozen=True)
class Link:
    """Two masked weights of one product, and for each row and column of the first the one of the second."""

    first: Call
    second: Call
    rows: Tensor
    columns: Tensor
    rotation: Tensor | None
    """Of spatial convolutions: what takes the first ``A`` to the second, up to sign."""

    @property
    def steps(self) -> int:
        """How many steps lie between."""
        return self.second.step - self.first.step


class Linking(Attack):
    """Matches ``w~`` of one step with that of a later one by signatures that permutations and scales do not change."""

    name = "linking"
    tries = (
        "Finds every row and column of a masked weight again in the one that the product gets at a later step, by "
        "balanced and sorted values, and the rotation between the masks of a spatial convolution, whose taps share "
        "them: fresh masks are then as good as one, and averages over steps undo noise."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Link]:
        """Of neighbouring weights, and of some twice as far apart, and so on."""
        found = []
        for layer in view.layers:
            calls = list({call.weight: call for call in view.of(layer)}.values())
            if not calls or (isinstance(calls[0].product, Conv) and calls[0].product.groups > 1):
                continue
            for distance in (1, 2, 4, 8, 16, 32):
                for first, second in list(zip(calls, calls[distance:], strict=False))[-PAIRS[effort] :]:
                    then, now = taps(first.w.double()), taps(second.w.double())
                    small = max(then.shape[:2]) <= CHANNELS[effort]
                    turned = distance == 1 and first is calls[-2] and then.shape[2] > 1 and small
                    rotation = rotations(now, then)[1] if turned else None
                    found.append(Link(first, second, *match(then, now), rotation))
        if not found:
            raise NotApplicable("no product's weight was sent twice")
        return found

    def score(self, recovered: list[Link], view: View, truth: Truth) -> Outcome:
        """Share of rows linked to the same plain row (by largest part, under mixing); how well rotations are known."""
        right: dict[int, float] = defaultdict(float)
        rows: dict[int, int] = defaultdict(int)
        columns = 0.0
        rotations_known: list[float] = []
        for link in recovered:
            then, now = truth.of(link.first), truth.of(link.second)
            rows_then, rows_now = (basecase.held_rows(each)[each.matrix("P").abs().argmax(1)] for each in (then, now))
            columns_then, columns_now = (each.matrix("A").abs().argmax(1) for each in (then, now))
            right[link.steps] += float((rows_now[link.rows] == rows_then).sum())
            rows[link.steps] += len(link.rows)
            if link.rotation is not None:
                true = now.matrix("A") @ torch.linalg.inv(then.matrix("A"))
                rotations_known.append(abs(float(nn.functional.cosine_similarity(link.rotation, true).mean())))
            columns += float((columns_now[link.columns] == columns_then).double().mean())
        distances = sorted(rows)
        shares = [right[distance] / rows[distance] for distance in distances]
        chance = len(recovered) / sum(rows.values())
        figures = [
            Figure(
                name="rows linked between steps",
                value=shares[0],
                chance=chance,
                ceiling=1.0,
                meaning="share of a weight's masked rows that are found again after the masks were renewed",
            ),
            Figure(
                name="columns linked between steps",
                value=columns / len(recovered),
                ceiling=1.0,
                meaning="the same of columns, over all distances",
            ),
        ]
        if rotations_known:
            figures.append(
                Figure(
                    name="masks of convolutions linked",
                    value=max(rotations_known),
                    chance=0.0,
                    ceiling=1.0,
                    meaning="correlation of the estimated change from one mask of channels to the next with the true "
                    "one, of the spatial convolution where it works best: at 1, fresh masks are one mask",
                )
            )
        linked = Figure(
            name="linked between steps",
            value=max(shares[0], *rotations_known, 0.0),
            leaks=LEAKS,
            chance=chance,
            ceiling=1.0,
            meaning="rows found again, or masks of convolutions linked, whichever is more",
        )
        return Outcome(
            figures=[linked, *figures],
            curves=[
                Curve(
                    title="linking: rows found again, over steps between",
                    x_label="steps between the two masked weights",
                    y_label="share of rows linked",
                    x=[float(distance) for distance in distances],
                    series={"rows linked": list(shares)},
                    leaks=LEAKS,
                )
            ],
        )

    def control(self) -> Control:
        """`tempo`, four steps of real training."""
        evidence = basecase.record(basecase.network(), steps=4, lr=0.1, scheme="tempo")
        return Control(
            evidence=evidence,
            figure="linked between steps",
            bound=0.99,
            source="issue: w~ of successive steps linked by nearest neighbour; permutations and scales keep signatures",
        )

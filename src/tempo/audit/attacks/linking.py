"""Linking over time: rows of a weight found again in the next step's masked weight, fresh masks or not."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor

from tempo.audit import basecase
from tempo.audit.attack import Attack, Control, Curve, Effort, Figure, NotApplicable, Outcome
from tempo.audit.attacks.signatures import match, taps
from tempo.audit.knowledge import Knowledge
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth
from tempo.wire.messages import Conv

PAIRS: dict[Effort, int] = {"quick": 2, "full": 8}
"""Pairs of steps that are compared, of each product and distance."""

LEAKS = 0.25
"""Share of rows: well above chance for any product of a dozen rows or more."""


@dataclass(frozen=True)
class Link:
    """Two masked weights of one product, and for each row and column of the first the one of the second."""

    first: Call
    second: Call
    rows: Tensor
    columns: Tensor

    @property
    def steps(self) -> int:
        """How many steps lie between."""
        return self.second.step - self.first.step


class Linking(Attack):
    """Matches ``w~`` of one step with that of a later one by signatures that permutations and scales do not change."""

    name = "linking"
    tries = (
        "Finds every row and column of a masked weight again in the one that the product gets at a later step, by "
        "balanced and sorted values: fresh masks are then as good as one, and averages over steps undo noise."
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
                    rows, columns = match(taps(first.w.double()), taps(second.w.double()))
                    found.append(Link(first, second, rows, columns))
        if not found:
            raise NotApplicable("no product's weight was sent twice")
        return found

    def score(self, recovered: list[Link], view: View, truth: Truth) -> Outcome:
        """Share of rows linked to the same plain row; under mixing, rows go by their largest part."""
        right: dict[int, float] = defaultdict(float)
        rows: dict[int, int] = defaultdict(int)
        columns = 0.0
        for link in recovered:
            then, now = truth.of(link.first), truth.of(link.second)
            rows_then, rows_now = (each.matrix("P").abs().argmax(1) for each in (then, now))
            columns_then, columns_now = (each.matrix("A").abs().argmax(1) for each in (then, now))
            right[link.steps] += float((rows_now[link.rows] == rows_then).sum())
            rows[link.steps] += len(link.rows)
            columns += float((columns_now[link.columns] == columns_then).double().mean())
        distances = sorted(rows)
        shares = [right[distance] / rows[distance] for distance in distances]
        chance = len(recovered) / sum(rows.values())
        return Outcome(
            figures=[
                Figure(
                    name="rows linked between steps",
                    value=shares[0],
                    leaks=LEAKS,
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
            ],
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
            figure="rows linked between steps",
            bound=0.99,
            source="issue: w~ of successive steps linked by nearest neighbour; permutations and scales keep signatures",
        )

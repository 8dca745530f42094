"""Gram matrices: orthogonal masks on features alone leave ``X~ X~ᵀ = X Xᵀ``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tempo.audit import lab
from tempo.audit.attack import Attack, Control, Effort, Evidence, Figure, NotApplicable, Outcome
from tempo.audit.controls.weak import OneSided
from tempo.audit.knowledge import Knowledge
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth


@dataclass(frozen=True)
class Grams:
    """Inner products of rows, by call."""

    calls: list[Call]
    grams: list[Tensor]


class Gram(Attack):
    """Reads the inner products of a batch's rows off ``X~ X~ᵀ``, as if rows were not mixed."""

    name = "gram"
    tries = (
        "Takes inner products of masked rows for those of plain rows: which tokens or images are alike. Orthogonal "
        "mixing of features alone keeps them exactly."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> Grams:
        """Of the first calls of every product of rows."""
        calls = [view.of(layer)[0] for layer in view.layers]
        calls = [call for call in calls if call.x.dim() == 2 and call.x.shape[0] <= 8192]
        if not calls:
            raise NotApplicable("no product of rows in this transcript")
        rows = [call.x[:512].double() for call in calls]
        return Grams(calls, [x @ x.T for x in rows])

    def score(self, recovered: Grams, view: View, truth: Truth) -> Outcome:
        """Correlation with the true inner products, off the diagonal."""
        found = []
        for call, guess in zip(recovered.calls, recovered.grams, strict=True):
            x = truth.of(call)["x"][: len(guess)].double()
            off = ~torch.eye(len(x), dtype=torch.bool)
            pair = torch.stack([(x @ x.T)[off], guess[: len(x), : len(x)][off]])
            found.append(abs(float(torch.corrcoef(pair)[0, 1].nan_to_num())))
        return Outcome(
            figures=[
                Figure(
                    name="correlation of inner products",
                    value=max(found),
                    leaks=0.5,
                    chance=0.0,
                    ceiling=1.0,
                    meaning="1 means that the worker sees which rows of a batch are alike, exactly",
                )
            ]
        )

    def control(self) -> Control:
        """Features rotated, rows left in order."""
        torch.manual_seed(0)
        with lab.open_lab(masks=OneSided()) as open_lab:
            model = nn.Linear(64, 64)
            open_lab.session.protect(model, base="secret")
            model(torch.randn(64, 64) @ torch.randn(64, 64))
            evidence = Evidence(open_lab.views[0], Knowledge(), open_lab.truth())
        return Control(evidence, "correlation of inner products", 0.999, "issue: X Xᵀ exact without row mixing")

"""Independent component analysis of masked inputs that share ``A``: rows are samples, features are sources."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tempo.audit import lab
from tempo.audit.attack import Attack, Control, Effort, Evidence, Outcome
from tempo.audit.controls.toys import sparse_features
from tempo.audit.controls.weak import FeaturesReused
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers.unmixing import PRODUCTS, Unmixing, fast_ica, gather, separation
from tempo.audit.transcript import View
from tempo.audit.truth import Truth


class ICA(Attack):
    """FastICA over everything that a product was sent under one mask of features."""

    name = "ica"
    tries = (
        "Gathers the masked rows that a product was sent under one mask of features, takes them for mixtures of "
        "independent features and separates these by FastICA. The more rows a mask serves, the better."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Unmixing]:
        """For the narrowest products."""
        gathered = gather(view, effort)[: PRODUCTS[effort]]
        iterations = 60 if effort == "quick" else 400
        return [Unmixing(some, fast_ica(some.x, iterations)) for some in gathered]

    def score(self, recovered: list[Unmixing], view: View, truth: Truth) -> Outcome:
        """How well features are separated."""
        return separation(recovered, truth, "independent component")

    def control(self) -> Control:
        """Features rotated by one mask for eight batches, rows left alone."""
        recorded = reused(sparse_features(8 * 1024, 32, torch.Generator().manual_seed(0)), FeaturesReused())
        evidence = Evidence(recorded.views[0], Knowledge(), recorded.truth())
        return Control(evidence, "features separated", 0.95, "issue: one-sided rotation without row mixing: separated")


def reused(x: Tensor, masks: FeaturesReused) -> lab.Lab:
    """A session that sent ``x`` in batches of 1024 rows to one layer, whose weight changes each time."""
    torch.manual_seed(0)
    model = nn.Linear(x.shape[1], 32)
    with lab.open_lab(masks=masks) as opened:
        opened.session.protect(model, base="secret")
        for batch in x.float().split(1024):
            model(batch)
            with torch.no_grad():
                model.weight.mul_(1.001)
    return opened

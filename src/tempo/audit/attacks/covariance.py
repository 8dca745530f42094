"""Covariance over batches: row masks cancel in ``X~ᵀ X~``, and what is left has the features' principal axes."""

from __future__ import annotations

import torch

from tempo.audit.attack import Attack, Control, Effort, Evidence, Figure, Outcome
from tempo.audit.attacks.ica import reused
from tempo.audit.controls.toys import sparse_features
from tempo.audit.controls.weak import FeaturesReused
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers.unmixing import PRODUCTS, Unmixing, flat, gather, separation
from tempo.audit.transcript import View
from tempo.audit.truth import Truth


class Covariance(Attack):
    """Averages ``X~ᵀ X~`` over what shares a mask, and takes its eigenvectors for features."""

    name = "covariance"
    tries = (
        "Averages the second moments of masked rows over all calls that share a mask of features: orthogonal row masks "
        "cancel. Eigenvectors are the features, where these are uncorrelated and of different strength; eigenvalues "
        "are the spectrum of the plain features in any case."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Unmixing]:
        """For the narrowest products."""
        found = []
        for some in gather(view, effort)[: PRODUCTS[effort]]:
            moments = torch.stack([flat(call.x).T @ flat(call.x) for call in some.calls]).sum(0)
            found.append(Unmixing(some, torch.linalg.eigh(moments)[1]))
        return found

    def score(self, recovered: list[Unmixing], view: View, truth: Truth) -> Outcome:
        """How well features are separated, and how exactly their spectrum is known."""
        outcome = separation(recovered, truth, "principal component")
        errors = []
        for guess in recovered:
            calls = guess.gathered.calls
            masked, plain = (
                torch.linalg.eigvalsh(sum((x.T @ x for x in rows), torch.tensor(0.0)))
                for rows in ([flat(call.x) for call in calls], [flat(truth.of(call)["x"]) for call in calls])
            )
            errors.append(float((masked - plain).norm() / plain.norm()))
        spectrum = Figure(
            name="error of the spectrum",
            value=min(errors),
            higher_leaks=False,
            meaning="relative error of the known eigenvalues of XᵀX: orthogonal masks keep them, so a worker knows how "
            "many directions the inputs have, not which",
        )
        return Outcome(figures=[*outcome.figures, spectrum])

    def control(self) -> Control:
        """Uncorrelated features of different strength, rotated by one mask for eight batches."""
        strength = 1.15 ** torch.arange(32, dtype=torch.float64)
        x = sparse_features(8 * 1024, 32, torch.Generator().manual_seed(0))
        recorded = reused((x - x.mean(0)) * strength, FeaturesReused())
        evidence = Evidence(recorded.views[0], Knowledge(), recorded.truth())
        return Control(evidence, "features separated", 0.95, "uncorrelated features of different strength: separated")

"""Non-negative factorisation: after ReLU, features are non-negative, and few rotations keep them so."""

from __future__ import annotations

import torch
from torch import Tensor

from tempo.audit.attack import Attack, Control, Effort, Evidence, Outcome
from tempo.audit.attacks.ica import reused
from tempo.audit.controls.weak import FeaturesReused
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers.unmixing import PRODUCTS, Unmixing, gather, separation, whiten
from tempo.audit.transcript import View
from tempo.audit.truth import Truth


class NMF(Attack):
    """Turns whitened rows until no feature is negative."""

    name = "nmf"
    tries = (
        "Takes masked rows for a rotation of non-negative features, as after ReLU, and turns them back until nothing "
        "is negative (non-negative independent component analysis: factorisation where the mixing has signs)."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Unmixing]:
        """For the narrowest products."""
        gathered = gather(view, effort)[: PRODUCTS[effort]]
        iterations = 150 if effort == "quick" else 1000
        return [Unmixing(some, non_negative(some.x, iterations)) for some in gathered]

    def score(self, recovered: list[Unmixing], view: View, truth: Truth) -> Outcome:
        """How well features are separated."""
        return separation(recovered, truth, "non-negative component")

    def control(self) -> Control:
        """Rectified Gaussian features rotated by one mask for eight batches, rows left alone."""
        x = torch.randn(8 * 1024, 32, generator=torch.Generator().manual_seed(0)).relu()
        recorded = reused(x, FeaturesReused())
        evidence = Evidence(recorded.views[0], Knowledge(), recorded.truth())
        return Control(evidence, "features separated", 0.95, "issue: one-sided rotation without row mixing: separated")


def non_negative(x: Tensor, iterations: int, seed: int = 0) -> Tensor:
    """Unmixing matrix by Plumbley's criterion (2003): whiten without taking the mean off, rotate out negative values.

    The rotation is found by projected gradient descent; its sign is fixed by the mean.
    """
    white, matrix = whiten(x, centre=False)
    generator = torch.Generator().manual_seed(seed)
    side = white.shape[1]
    rotation = torch.linalg.qr(torch.randn(side, side, generator=generator, dtype=torch.float64))[0]
    rotation = rotation * torch.where((white.mean(0) @ rotation) < 0, -1.0, 1.0)
    for _ in range(iterations):
        negative = (white @ rotation).clamp_max(0)
        left, _, right = torch.linalg.svd(rotation - white.T @ negative / len(white))
        rotation = left @ right
    found: Tensor = matrix @ rotation
    return found

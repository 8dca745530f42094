"""Cloak truncation: a cloak that sticks out of the spectrum of ``W`` falls with the leading directions of ``w~``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tempo.audit.attack import Attack, Control, Effort, Figure, NotApplicable, Outcome
from tempo.audit.attacks.sparse_frame import single
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import StrongCloak
from tempo.audit.knowledge import Knowledge
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth
from tempo.schemes.mixing import LEAST_CLOAK
from tempo.wire.messages import Linear

QUICK_PRODUCTS = 4


@dataclass(frozen=True)
class Truncated:
    """Of each call, the leading left and right singular vectors of ``w~``."""

    calls: list[Call]
    leading: list[tuple[Tensor, Tensor]]


class CloakTruncation(Attack):
    """Drops as many leading singular directions as a cloak has."""

    name = "cloak-truncation"
    tries = (
        "Takes the leading singular directions of the masked weight for the cloak's and drops them, which masks cannot "
        "prevent: a cloak stronger than the weight itself is then gone, and the weight is as bare as without one."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> Truncated:
        """Of the newest calls; a cloak's rank is a setting, and settings are no secret.

        Raises:
            NotApplicable: No product is large enough to bear a cloak.
        """
        calls = [view.of(layer)[-1] for layer in view.layers]
        calls = [call for call in calls if isinstance(call.product, Linear) and min(call.w.shape) > 2 * LEAST_CLOAK]
        calls = [call for call in calls if not call.public]
        if not calls:
            raise NotApplicable("no linear product with more features than twice a cloak's rank, and a secret weight")
        calls = calls[-QUICK_PRODUCTS:] if effort == "quick" else calls
        return Truncated(calls, [leading(call.w.double(), LEAST_CLOAK) for call in calls])

    def score(self, recovered: Truncated, view: View, truth: Truth) -> Outcome:
        """Share of the cloak's energy that is left.

        Raises:
            NotApplicable: Nothing was cloaked.
        """
        rest: list[tuple[float, float]] = []
        for call, (u, v) in zip(recovered.calls, recovered.leading, strict=True):
            behind = truth.of(call)
            w = torch.linalg.inv(behind.matrix("P")).T @ behind["w"].double() @ behind.matrix("A").T
            cloak = call.w.double() - w
            energy = float(cloak.norm() / w.norm())
            if energy > 1e-3:  # below is the rounding of what was sent
                left = cloak - u @ (u.T @ cloak)
                left = left - (left @ v) @ v.T
                rest.append((float((left.norm() / cloak.norm()).square()), energy))
        if not rest:
            raise NotApplicable("no cloak lies on the weights of this transcript")
        least, energy = min(rest)
        smallest = min(min(call.w.shape) for call in recovered.calls)
        return Outcome(
            figures=[
                Figure(
                    name="cloak left",
                    value=least,
                    leaks=0.2,
                    higher_leaks=False,
                    chance=(1 - LEAST_CLOAK / smallest) ** 2,
                    ceiling=0.0,
                    meaning="share of the cloak's energy outside the dropped directions, of the product that keeps "
                    "least; a cloak inside the weight's spectrum keeps about as much as chance",
                ),
                Figure(name="cloak beside weight", value=energy, meaning="norm of that cloak beside the weight's"),
            ]
        )

    def control(self) -> Control:
        """A cloak as strong as the weight."""
        evidence = basecase.record(single(128), masks=StrongCloak(1.0))
        return Control(evidence, "cloak left", 0.05, "measured before: 2% left at energy ratio 1, 0.1% at 4")


def leading(w: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` left and right singular vectors."""
    u, _, vt = torch.linalg.svd(w, full_matrices=False)
    return u[:, :count], vt[:count].T

"""What a weight costs on the wire: updated here, or on the worker where it lives."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UpdateCost:
    """Elements on the wire per step and element of a weight, both ways together; activations are the same either way.

    Attributes:
        trusted: The weight goes to each worker that takes part in its product, a gradient comes back from each.
        worker: Weight and states come back, and go out under fresh masks, once in as many steps as masks serve.
    """

    trusted: float
    worker: float

    @property
    def saved(self) -> float:
        """By updates on a worker, of ``trusted``; below zero where they cost more."""
        return 1 - self.worker / self.trusted


def update_cost(rows: int, rekey_rows: int, states: int, workers: int = 1) -> UpdateCost:
    """Of one weight.

    Args:
        rows: In every step.
        rekey_rows: How many rows masks serve.
        states: Tensors that the optimizer keeps of a weight.
        workers: How many take part where the weight is updated here.
    """
    return UpdateCost(2.0 * workers, 2.0 * (1 + states) / math.ceil(rekey_rows / rows))

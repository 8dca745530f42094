"""Inputs with labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Inputs as the model takes them, and the class of each."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Samples:
        """At most ``count`` of them."""
        return Samples(self.inputs[:count], self.labels[:count])

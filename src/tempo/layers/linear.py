"""`nn.Linear`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tempo.engine.adapters import Operands
from tempo.layers.base import Protected


class ProtectedLinear(Protected, nn.Linear):
    """A fully connected layer whose product is computed under masks."""

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name PyTorch uses
        """``input @ weight.T + bias``, for input of shape (..., in_features)."""
        if self._tempo.stays(input, self.weight):
            return super().forward(input)
        plain = super().forward
        y: Tensor = self._tempo.linear(input, self.operands, lambda: plain(input))
        return y

    def operands(self) -> Operands:
        """Its weight and bias now."""
        return Operands(self.weight, self.bias)

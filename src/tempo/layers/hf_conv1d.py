"""Hugging Face's `Conv1D`: a fully connected layer that stores its weight transposed (GPT-2 and relatives)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from tempo.engine.adapters import Operands
from tempo.layers.base import Protected


class ProtectedHFConv1D(Protected, Conv1D):
    """`transformers.pytorch_utils.Conv1D` whose product is computed under masks."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight + bias``, for input of shape (..., nx)."""
        plain = super().forward
        y: Tensor = self._tempo.linear(x, self.operands, lambda: plain(x))
        return y

    def operands(self) -> Operands:
        """Its weight, output features first, and bias now."""
        return Operands(self.weight.t(), self.bias)

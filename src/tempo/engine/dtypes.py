"""Which dtype a product is computed in, and which one it travels in."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

WIRE_DTYPES: Final[dict[torch.dtype, torch.dtype]] = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    # Half precision has no room for scales: its range ends at 65504.
    torch.float16: torch.float32,
}


def masked_dtype(setting: str, dtype: torch.dtype) -> torch.dtype:
    """What operands of a product computed in ``dtype`` are masked in, under the setting ``wire_dtype``."""
    if setting == "int8":  # `Link` packs float32, and nothing else
        return torch.float64 if dtype == torch.float64 else torch.float32
    return WIRE_DTYPES[dtype] if setting == "auto" else getattr(torch, setting)


def answer_dtype(setting: str, masked: torch.dtype) -> torch.dtype:
    """What its answers travel in.

    Where operands are packed into 8 bits, answers come in bfloat16: what is tolerated of an honest worker is what its
    rounding may do, and rounding to 8 bits would let lies pass that are about six times as large (docs/wire.md).
    """
    return torch.bfloat16 if setting == "int8" and masked == torch.float32 else masked


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype plain PyTorch would multiply in, autocast included."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype

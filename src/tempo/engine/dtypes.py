"""Which dtype a product is computed in, and which one it travels in."""

from __future__ import annotations

import torch
from torch import Tensor

WIRE_DTYPES = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    # Half precision has no room for scales: its range ends at 65504.
    torch.float16: torch.float32,
}


def on_the_wire(setting: str, dtype: torch.dtype) -> torch.dtype:
    """What operands of a product computed in ``dtype`` travel in, by the setting ``wire_dtype``."""
    found: torch.dtype = WIRE_DTYPES[dtype] if setting == "auto" else getattr(torch, setting)
    return found


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype plain PyTorch would multiply in, autocast included."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype

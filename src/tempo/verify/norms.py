"""Lengths of vectors whose squares may leave the range of float32."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def lengths(t: Tensor, dim: int) -> Tensor:
    """Euclidean lengths along ``dim``, float64, never less than the true ones by more than rounding."""
    # Along other axes than the last, torch's norms are ten times as slow as this.
    found: Tensor = torch.linalg.vector_norm(t, dim=dim) if dim == t.dim() - 1 else t.square().sum(dim).sqrt_()
    if out_of_range(found):
        found = torch.linalg.vector_norm(t, dim=dim, dtype=torch.float64)
        return found
    return found.double().add_(lost(t.dtype, t.shape[dim]))


@cache
def lost(dtype: torch.dtype, count: int) -> float:
    """Length that ``count`` elements can have although their squares all vanish in ``dtype``."""
    return float((count * torch.finfo(dtype).tiny) ** 0.5)


def out_of_range(found: Tensor) -> bool:
    """Whether the longest of these lengths says that squares may have overflowed, or all have vanished."""
    limit = torch.finfo(torch.float32).tiny ** -0.5 / 1e4
    return found.numel() > 0 and not 1 / limit < float(found.max()) < limit

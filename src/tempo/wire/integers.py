"""A public weight as integers: the same ones wherever they are made."""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from torch import Tensor

_BLOCK: Final = 1 << 17
"""Elements at a time, so that they stay in a core's cache."""


def integers(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round a weight to integers, with one scale for every output feature.

    Every step is one correctly rounded operation in float32, so that the result is the same on any machine.

    Args:
        w: (m, d), floating point, finite.
        bits: 2 to 16, the sign included.

    Returns:
        int8 (int16 above 8 bits) of shape (m, d), of magnitude below 2^(bits-1); and scales (m, 1), float32, by which
        rows are multiplied to give ``w`` again, or nearly.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"{bits} bits; a weight has 2 to 16")
    w = w.detach()
    largest = (1 << (bits - 1)) - 1
    w_q = torch.empty(w.shape, dtype=torch.int8 if bits <= 8 else torch.int16)
    scales = torch.empty(len(w), 1)
    rows = max(1, _BLOCK // max(1, w.shape[1]))
    for w_part, out, scale in zip(w.split(rows), w_q.split(rows), scales.split(rows), strict=True):
        part = w_part.float()
        scale.copy_(part.abs().amax(1, keepdim=True).div_(largest))
        scale.masked_fill_(scale == 0, 1.0)
        out.copy_(part.div(scale).round_().clamp_(-largest, largest))
    return w_q, scales


def digest(w_q: Tensor) -> bytes:
    """SHA-256 of integers: their dtype and shape, as Python prints them, and their bytes. 32 bytes."""
    found = hashlib.sha256(f"{w_q.dtype} {list(w_q.shape)} ".encode())
    found.update(w_q.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.digest()

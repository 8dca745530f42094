"""A public weight as integers: the same ones wherever they are made."""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from torch import Tensor

RMS: Final = 40
"""Root mean square of a feature's integers, at most, of up to 9 bits; each further bit doubles it."""

_FINE: Final = (1 << 15) - 1
"""What a feature's largest element is while squares are summed: exactly in float64, for up to 2^23 of them."""

_BLOCK: Final = 1 << 17
"""Elements at a time, so that they stay in a core's cache."""


def integers(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round a weight to integers, with one scale for every output feature.

    The largest integer of a feature is chosen so that the root mean square of its integers is `RMS` or, where it has
    outliers for which so many bits are too few, less. Rows are rounded as finely as the longest feature allows, so that
    none may be longer than the others, and all others may be as long.

    Every step is one correctly rounded operation, or an exact sum of integers, so that the result is the same on any
    machine.

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
    largest, target = (1 << (bits - 1)) - 1, RMS << max(0, bits - 9)
    w_q = torch.empty(w.shape, dtype=torch.int8 if bits <= 8 else torch.int16)
    scales = torch.empty(len(w), 1)
    rows = max(1, _BLOCK // max(1, w.shape[1]))
    for w_part, out, scale in zip(w.split(rows), w_q.split(rows), scales.split(rows), strict=True):
        part = w_part.float()
        peak = part.abs().amax(1, keepdim=True)
        peak.masked_fill_(peak == 0, 1.0)
        squares = part.div(peak).mul_(_FINE).round_().double().square_().sum(1, keepdim=True)
        rms = squares.div_(w.shape[1]).sqrt_().div_(_FINE)
        most = rms.reciprocal_().mul_(target).round_().clamp_(1, largest)
        scale.copy_(peak.div_(most.float()))
        scale.masked_fill_(scale == 0, 1.0)
        out.copy_(part.div(scale).round_().clamp_(-largest, largest))
    return w_q, scales


def digest(w_q: Tensor) -> bytes:
    """SHA-256 of integers: their dtype and shape, as Python prints them, and their bytes. 32 bytes."""
    found = hashlib.sha256(f"{w_q.dtype} {list(w_q.shape)} ".encode())
    found.update(w_q.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.digest()

"""Random numbers and matrices from a keystream: Gaussians, Haar orthogonal matrices, matrices of bounded condition."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tempo.keys import Keystream


def uniforms(stream: Keystream, count: int) -> Tensor:
    """``count`` float64 numbers, uniform on the multiples of 2^-53 in (0, 1]; never zero, so their logarithm exists."""
    draws = stream.read(8 * count).view(np.uint64) >> np.uint64(11)
    return torch.from_numpy((draws.astype(np.float64) + 1) * 2.0**-53)


def gaussians(stream: Keystream, count: int) -> Tensor:
    """``count`` independent standard normal numbers in float64, by Box and Muller."""
    half = (count + 1) // 2
    u = uniforms(stream, 2 * half)
    radius = u[:half].log().mul(-2).sqrt()
    angle = u[half:] * (2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def orthogonal(stream: Keystream, count: int, side: int) -> Tensor:
    """``count`` matrices, Haar distributed on O(side).

    QR of a Gaussian matrix alone is not Haar: its Q depends on how signs are chosen. Making the diagonal of R
    positive makes the factorisation unique, and Q uniform (Mezzadri, arXiv math-ph/0609050).
    """
    q: Tensor
    q, r = torch.linalg.qr(gaussians(stream, count * side * side).view(count, side, side))
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)


def blocks(stream: Keystream, count: int, side: int, condition: float) -> tuple[Tensor, Tensor]:
    """``count`` matrices and their inverses.

    Args:
        stream: Where the randomness comes from.
        count: How many.
        side: Their size.
        condition: 1 for Haar orthogonal ones; above, ``U diag(σ) Vᵀ`` with Haar ``U``, ``V`` and ``σ`` log-uniform
            within ``condition ** ±0.5``, so that no condition number exceeds ``condition``.
    """
    u = orthogonal(stream, count, side)
    if condition == 1:
        return u, u.mT
    v = orthogonal(stream, count, side)
    sigma = (uniforms(stream, count * side).view(count, 1, side) - 0.5).mul(math.log(condition)).exp()
    return (u * sigma) @ v.mT, (v / sigma) @ u.mT

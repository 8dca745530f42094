"""Random numbers and matrices from a keystream: Gaussians, Haar orthogonal matrices, matrices of bounded condition."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tempo import kernels
from tempo.keys import Keystream


def uniforms(stream: Keystream, count: int) -> Tensor:
    """``count`` float64 numbers, uniform on the odd multiples of 2^-52 in (0, 1): no logarithm is 0 or infinite."""
    draws = stream.read(8 * count).view(np.uint64)
    # 51 random bits and a one, after the sign and exponent of 1, are a number in (1, 2).
    draws >>= np.uint64(12)
    draws |= np.uint64(0x3FF << 52 | 1)
    numbers = draws.view(np.float64)
    np.subtract(2.0, numbers, out=numbers)
    return torch.from_numpy(numbers)


def gaussians(stream: Keystream, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``count`` independent standard normal numbers, by Box and Muller.

    Args:
        stream: Where the randomness comes from.
        count: How many.
        dtype: float64, which takes 64 bits of the stream for a number and reaches to 8.4 standard deviations, or
            float32: 32 bits, 6.7.
    """
    half = (count + 1) // 2
    single = dtype == torch.float32
    if native := kernels.native():
        words = torch.from_numpy(stream.read(2 * half * dtype.itemsize).view(np.float32 if single else np.float64))
        native.gaussians(words)
        return words[:count]
    if single:
        draws = stream.read(8 * half).view(np.uint32)
        numbers = torch.from_numpy((draws + 0.5) * 2.0**-32)
    else:
        numbers = uniforms(stream, 2 * half)
    radius, angle = numbers[:half], numbers[half:]
    radius.log_().mul_(-2).sqrt_()
    angle.mul_(2 * math.pi)
    sine = angle.sin()
    angle.cos_().mul_(radius)
    radius.mul_(sine)
    return numbers[:count].to(dtype)


def orthogonal(stream: Keystream, count: int, side: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``count`` matrices, Haar distributed on O(side), in ``dtype``: float64, or float32, both to its rounding.

    What QR of Gaussian matrices gives where the diagonal of R is made positive, which makes it unique and Q uniform
    (Mezzadri, arXiv math-ph/0609050). Nothing is factorised for it: reflections keep what they have not yet reduced
    Gaussian and independent, so each vector that QR would reduce is drawn instead (Stewart, SIAM J. Numer. Anal. 17,
    1980).
    """
    numbers = gaussians(stream, count * (side * (side + 1) // 2), dtype).view(count, -1)
    if native := kernels.native():
        found = numbers.new_empty(count, side, side)
        native.orthogonal(numbers, found)
        return found
    # Column k: zeros, then the vector that reflection k turns into a multiple of its first unit vector.
    x = numbers.new_zeros(count, side, side)
    x[:, *torch.tril_indices(side, side)] = numbers
    first = x.diagonal(dim1=1, dim2=2).clone()
    sign = torch.where(first < 0, -1.0, 1.0).to(first.dtype)
    norm = torch.linalg.vector_norm(x, dim=1)
    x /= (first + sign * norm).unsqueeze(1)
    q: Tensor = torch.linalg.householder_product(x, 1 + first.abs() / norm)
    return q.mul_(-sign.unsqueeze(1))  # the diagonal of R would be -sign * norm


def blocks(
    stream: Keystream, count: int, side: int, condition: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """``count`` matrices and their inverses.

    Args:
        stream: Where the randomness comes from.
        count: How many.
        side: Their size.
        condition: 1 for Haar orthogonal ones; above, ``U diag(σ) Vᵀ`` with Haar ``U``, ``V`` and ``σ`` log-uniform
            within ``condition ** ±0.5``, so that no condition number exceeds ``condition``.
        dtype: float64 or float32; inverses of general ones are exact to float64 before they are rounded to it.
    """
    if condition == 1:
        u = orthogonal(stream, count, side, dtype)
        return u, u.mT
    u, v = orthogonal(stream, count, side), orthogonal(stream, count, side)
    sigma = (uniforms(stream, count * side).view(count, 1, side) - 0.5).mul(math.log(condition)).exp()
    return ((u * sigma) @ v.mT).to(dtype), ((v / sigma) @ u.mT).to(dtype)

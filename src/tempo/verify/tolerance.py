"""How far an honest answer may be off, and what a dishonest one is caught at.

A row of an answer (of ``y`` and ``dx``; of ``dw`` an output feature) is ``a M``: a row ``a`` of one operand times all
of the other, ``M``. Every step of a sum adds an error of at most ``u`` times the partial sum. In whatever order a
worker adds, the partial sums of a row's elements are some of ``a`` times the same rows of ``M``: a vector no longer
than ``‖a‖ ‖M‖_F``. With errors of mean zero, independent of each other (the model of Higham and Mary, SIAM J. Sci.
Comput. 41, 2019), ``n`` steps leave an error of root mean square length ``√n u ‖a‖ ‖M‖_F``. The same holds for the
check's own sums, whose partial sums are such vectors seen through a Gaussian one. Rounding the answer adds at most
``u_out ‖answer‖``, in any model.

Through ``k`` secret Gaussian vectors an error of length ``ε`` shows as ``k`` numbers, and their length is ``ε`` times
a chi variable. So what is tolerated is `threshold` times `error_norm`. An honest row that reaches its bound
exceeds that once in ``1 / FALSE_ALARM`` checks; sums of numbers of both signs stay far below the bound.
"""

from __future__ import annotations

from functools import cache
from math import sqrt
from typing import Final

import torch
from torch import Tensor

FALSE_ALARM: Final = 1e-12
"""Probability that a row whose error is as long as its bound is rejected."""


@cache
def threshold(vectors: int) -> float:
    """What a chi variable of ``vectors`` degrees of freedom exceeds with probability `FALSE_ALARM`."""
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        if _tail(middle * middle, vectors) > FALSE_ALARM:
            low = middle
        else:
            high = middle
    return high


def miss(ratio: float, vectors: int) -> float:
    """Probability that an error of ``ratio`` times the tolerance, in one row, is accepted: ``P(χ²_k ≤ 1/ratio²)``.

    Of an answer with several wrong rows, the worst one bounds the probability from above. No number of answers enters:
    a liar learns that a lie was accepted and nothing else, and the first rejection ends it, so all that it can do is
    fixed in advance; and the first lie of at least this ratio has to be accepted.
    """
    if ratio <= 0:
        return 1.0
    return float(torch.special.gammainc(*_arguments(1 / (ratio * ratio), vectors)))


def unseen_ratio(answers: int, vectors: int, survival: float = 0.5) -> float:
    """How long an error in each of ``answers`` may be, relative to the tolerance, if all are to pass with ``survival``.

    Under vectors drawn anew for each answer; where some share vectors and the error's direction, those count as one.
    """
    allowed = 1 - survival ** (1 / answers)
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        if _tail(middle * middle, vectors) > allowed:
            low = middle
        else:
            high = middle
    return 1 / high


def _tail(square: float, vectors: int) -> float:
    return float(torch.special.gammaincc(*_arguments(square, vectors)))


def _arguments(square: float, vectors: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(vectors / 2, dtype=torch.float64), torch.tensor(square / 2, dtype=torch.float64)


def error_norm(
    scale: Tensor, answer: Tensor, steps: int, work: torch.dtype, rounded_to: torch.dtype, width: int
) -> Tensor:
    """Length of an honest row's error, the check's own included.

    Args:
        scale: ``‖a‖ ‖M‖_F`` per row, float64.
        answer: Norm of the row that came, float64; of those in ``work`` zero will do, being within ``scale``.
        steps: Rounded additions, of worker and check together, by which ``scale`` comes in.
        work: What sums are kept in: float32, or float64 where the operands are.
        rounded_to: The coarsest dtype that the answer went through.
        width: Elements of a row.

    Returns:
        Float64, never zero: results below the smallest normal number may have been flushed to zero.
    """
    u = torch.finfo(work).eps / 2
    rounding: Tensor = (steps + 1) ** 0.5 * u * scale
    out = torch.finfo(rounded_to)
    lost = sqrt(width) * (steps * torch.finfo(work).tiny + out.smallest_normal * out.eps / 2)
    if rounded_to == work:
        return rounding + lost
    return torch.hypot(rounding, out.eps / 2 * answer).add_(lost)

"""How far an honest answer may be off, and what a dishonest one is caught at.

A row of an answer (of ``y`` and ``dx``; of ``dw`` an output feature) is ``a M``: a row ``a`` of one operand times all
of the other, ``M``. Every step of a sum adds an error of at most ``u`` times the partial sum. In whatever order a
worker adds, the partial sums of a row's elements are some of ``a`` times the same rows of ``M``: a vector no longer
than ``‖a‖ ‖M‖_F``. With errors of mean zero, independent of each other (the model of Higham and Mary, SIAM J. Sci.
Comput. 41, 2019), ``n`` steps leave an error of root mean square length ``√n u ‖a‖ ‖M‖_F``. The same holds for the
check's own sums, whose partial sums are such vectors seen through a Gaussian one. Rounding the answer adds at most
``u_out ‖answer‖``, in any model. Sums of equal numbers break the model, and get a term of their own: `Rounding`.

Through ``k`` secret Gaussian vectors an error of length ``ε`` shows as ``k`` numbers, and their length is ``ε`` times
a chi variable. So what is tolerated is `threshold` times `Rounding.error_norm`. An honest row that reaches its bound
exceeds that once in ``1 / FALSE_ALARM`` checks; sums of numbers of both signs stay far below the bound.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    return _exceeded_with(FALSE_ALARM, vectors)


@cache
def between(vectors: int) -> tuple[float, float]:
    """What a chi variable of ``vectors`` degrees of freedom is below and above with probability `FALSE_ALARM` each."""
    return _exceeded_with(1 - FALSE_ALARM, vectors), _exceeded_with(FALSE_ALARM, vectors)


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
    return 1 / _exceeded_with(allowed, vectors)


def _exceeded_with(probability: float, vectors: int) -> float:
    """What a chi variable of ``vectors`` degrees of freedom exceeds with ``probability``."""
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        if _tail(middle * middle, vectors) > probability:
            low = middle
        else:
            high = middle
    return high


def _tail(square: float, vectors: int) -> float:
    return float(torch.special.gammaincc(*_arguments(square, vectors)))


def _arguments(square: float, vectors: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(vectors / 2, dtype=torch.float64), torch.tensor(square / 2, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the rows of an answer were rounded.

    Attributes:
        inner: Products that an element is the sum of.
        width: Elements of a row.
        work: What the check's sums are kept in, and a worker's at least: float32, or float64 where the operands are.
        through: The coarsest dtype that the answer went through.
    """

    inner: int
    width: int
    work: torch.dtype
    through: torch.dtype

    def error_norm(self, scale: Tensor, answer: Tensor, drifted: Tensor | None = None) -> Tensor:
        """Length of an honest row's error, the check's own included.

        Errors of equal numbers' sums all point one way: up to ``n u / 2`` of the answer's length, for the worker and as
        much for the check.

        Args:
            scale: ``‖a‖ ‖M‖_F`` per row, float64.
            answer: Length of the row that came, float64.
            drifted: ``‖a‖ ‖δM‖_F`` per row, where ``M`` may differ from what is known of it by ``δM``; float64.

        Returns:
            Float64, never zero: results below the smallest normal number may have been flushed to zero.
        """
        of_scale, of_rounded, of_answer, lost = self.terms()
        error = scale * of_scale
        if of_rounded:
            error = torch.hypot(error, of_rounded * answer)
        error = torch.add(error, answer, alpha=of_answer).add_(lost)
        return error if drifted is None else torch.hypot(error, drifted)

    def terms(self) -> tuple[float, float, float, float]:
        """The error of sums per scale; those of rounding and of equal numbers' sums per length of an answer; what may
        underflow.
        """
        work, through = torch.finfo(self.work), torch.finfo(self.through)
        u = work.eps / 2
        steps = 2 * (self.inner + self.width) + 1
        rounded = through.eps / 2 if self.through != self.work else 0.0
        lost = sqrt(self.width) * (steps * work.tiny + through.smallest_normal * through.eps / 2)
        return sqrt(steps) * u, rounded, self.inner * u / 2, lost

    @property
    def finite_below(self) -> float:
        """The scale below which an answer has to be finite, and the check's sums: no element exceeds the scale, and no
        sum by more than Gaussians ever make of it.
        """
        return min(torch.finfo(self.through).max, torch.finfo(self.work).max / 64, 1e150)

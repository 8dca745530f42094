"""Checks of the answers to one worker: made from what is sent, before it is sent; used on what comes back.

    WeightCheck(product, w~, key)          a = w~ᵀ r, b = w~ v                      r, v secret, kept with the weight
      .forward(x~, key) -> InputCheck      c = x~ a, q = x~ z                       z secret, drawn for this call
        .output(y~)                        y~ r = c ?
        .backward(g~) -> GradientCheck     c = g~ b, and g~ᵀ q
          .input_gradient(dx~)             dx~ v = c ?
          .weight_gradient(dw~)            dw~ z = g~ᵀ q ?

All on masked tensors exactly as sent and received, so it is the same for every scheme; every worker has checks of its
own. A convolution is the same, with pixels as rows: `tempo.verify.forms`. Tolerances: `tempo.verify.tolerance`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import inf, prod
from typing import Final

import torch
from torch import Tensor

from tempo import kernels
from tempo.keys import Key
from tempo.schemes.haar import gaussians
from tempo.schemes.operators import work_dtype
from tempo.schemes.reply import Tally
from tempo.verify.forms import form
from tempo.verify.sums import Sums
from tempo.verify.tolerance import Rounding, threshold
from tempo.wire.messages import Product

VECTORS: Final = 4
"""Secret vectors per check: the chance that a large lie passes falls with this power of its size."""


@dataclass(frozen=True, slots=True)
class Residual:
    """What a check found in the worst row of an answer.

    Attributes:
        ratio: Residual over tolerance; infinite where the answer is not finite although it has to be.
        row: That row: (row) of a matrix, (group, pixel of all images) of a convolution, (group, feature) of its
            ``dw``.
        residual: Length of the differences of the row's sums.
        tolerance: What it may be.
        rows: Rows in the answer.
        unchecked: Rows among them that could not be checked: an operand is not finite there, or the product may be
            larger than the answer's dtype can hold, and the answer is not finite either.
    """

    ratio: float = 0.0
    row: tuple[int, ...] = ()
    residual: float = 0.0
    tolerance: float = 0.0
    rows: int = 0
    unchecked: int = 0

    @property
    def passed(self) -> bool:
        """Whether the answer may be used."""
        return self.ratio <= 1


@dataclass(frozen=True, slots=True)
class AnswerCheck:
    """How to judge one answer, once.

    Attributes:
        judge: Of the answer, and of where to copy it in the same pass, if anywhere: see `InputCheck.output`.
        vectors: If the answer may be judged by sums of its rows instead, made by whoever reads it: what to sum rows
            with, (k, d).
        judge_sums: Of those sums, and of the answer's dtype.
    """

    judge: Callable[[Tensor, Tensor | None], Residual]
    vectors: Tensor | None = None
    judge_sums: Callable[[Sums, torch.dtype], Residual] | None = None


class WeightCheck:
    """What is kept of a masked weight to check products with it.

    Args:
        product: What the worker computes.
        w_masked: The weight as sent, (m, d) or (m, d/groups, …).
        key: Fresh, and of this weight and worker alone: nothing else draws from its streams ``r`` and ``v``.
        vectors: How many secret vectors.
        written: Whether ``w_masked`` is there already; else `sent` follows when it is.

    Attributes:
        drift: How far a weight that its worker changes may be from what is kept of it: `tempo.verify.sketch`.
    """

    drift: float = 0.0

    def __init__(
        self, product: Product, w_masked: Tensor, key: Key, vectors: int = VECTORS, *, written: bool = True
    ) -> None:
        self.vectors = vectors
        self.dtype = w_masked.dtype
        self.shape = tuple(w_masked.shape)
        self.work = work = work_dtype(w_masked)
        self.form = form(product, work)
        groups = self.form.groups
        self.r = _draw(key, "r", (groups, vectors, self.shape[0] // groups), work)
        self.v = _draw(key, "v", (groups, vectors, self.shape[1]), work)
        if written:
            self.sent(w_masked)

    def tally(self) -> Tally | None:
        """What to sum of ``w~`` while it is written, for `sent`; None: nothing."""
        return self.form.tally([self.v[0]], self.r[0])

    def sent(self, w_masked: Tensor, tally: Tally | None = None) -> None:
        """Keep what is needed of ``w~``, which is about to be sent, or was summed by ``tally`` already."""
        self.from_outputs, self.from_inputs, self.length = self.form.weight(w_masked, self.r, self.v, tally)

    def forward(self, x_masked: Tensor, key: Key, *, keep: bool, want_y: bool = True) -> InputCheck:
        """What is kept of an input ``x~``, (T, d) or (N, d, …), about to be multiplied by the weight.

        Args:
            x_masked: As sent.
            key: Fresh, and of this call and worker alone: nothing else draws from its stream ``z``.
            keep: Whether a weight gradient may follow.
            want_y: Whether an output will come.
        """
        check = InputCheck(self, key, keep=keep, want_y=want_y)
        check.sent(x_masked)
        return check


class InputCheck:
    """What is kept of a masked input, once it was `sent`; arguments as those of `WeightCheck.forward`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __init__(self, weight: WeightCheck, key: Key, *, keep: bool, want_y: bool) -> None:
        self.weight = weight
        self.z: Tensor | None = None
        self.q: Tensor | None = None
        self.y: Sums | None = None
        self._want_y = want_y
        self._kernels = []
        if want_y:
            self._kernels.append(weight.from_outputs)
        if keep:
            self.z = _draw(key, "z", (weight.form.groups, weight.vectors, prod(weight.shape[1:])), weight.r.dtype)
            self._kernels.append(weight.form.as_kernel(self.z, weight.shape))

    def tally(self) -> Tally | None:
        """What to sum of ``x~`` while it is written, for `sent`; None: nothing."""
        return self.weight.form.tally(self._kernels) if self._kernels else None

    def sent(self, x_masked: Tensor, tally: Tally | None = None) -> None:
        """Keep what is needed of ``x~``, which is about to be sent, or was summed by ``tally`` already."""
        self.dtype = x_masked.dtype
        self.shape = tuple(x_masked.shape)
        if self._kernels:
            sums, of_rows, self.length = self.weight.form.inputs(x_masked, self._kernels, tally)
            if self._want_y:
                self.y = Sums(sums[0], of_rows)
            if self.z is not None:
                self.q = sums[-1]
        self._kernels = []

    def output(self, y_masked: Tensor, into: Tensor | None = None) -> Residual:
        """Check ``y~``.

        Args:
            y_masked: As received; read once.
            into: Where to copy it in the same pass, if anywhere: what is judged is what lies there, whoever changes
                ``y_masked`` meanwhile.
        """
        return self._output(self.weight.form.rows(y_masked, into, self.weight.r), y_masked.dtype)

    def output_check(self) -> AnswerCheck:
        """What judges ``y~``."""
        return AnswerCheck(self.output, self.weight.form.summed_with(self.weight.r), self._output)

    def _output(self, found: Sums, dtype: torch.dtype) -> Residual:
        weight = self.weight
        if self.y is None:
            raise ValueError("no output was announced for this input")
        expected, self.y = self.y, None
        inner, width = prod(weight.shape[1:]), weight.r.shape[2]
        rounding = Rounding(inner, width, weight.work, _coarsest(self.dtype, weight.dtype, dtype))
        return _compare(expected, weight.length, rounding, found, weight.drift)

    def gradient_tally(self, *, want_dx: bool, want_dw: bool) -> Tally | None:
        """What to sum of ``g~`` while it is written, for `backward`; None: nothing."""
        weight = self.weight
        return weight.form.tally([weight.from_inputs], self.q if want_dw else None) if want_dx else None

    def backward(self, g_masked: Tensor, *, want_dx: bool, want_dw: bool, tally: Tally | None = None) -> GradientCheck:
        """What is kept of a gradient ``g~`` of the output, about to be sent; same shape as ``y~``.

        Args:
            g_masked: As sent.
            want_dx: Whether ``dx~`` will come.
            want_dw: Whether ``dw~`` will come; the input was announced with ``keep``.
            tally: What summed it already, if anything did.
        """
        return GradientCheck(self, g_masked, tally, want_dx=want_dx, want_dw=want_dw)


class GradientCheck:
    """What is kept of a masked gradient; see `InputCheck.backward`."""

    def __init__(
        self, source: InputCheck, g_masked: Tensor, tally: Tally | None, *, want_dx: bool, want_dw: bool
    ) -> None:
        if want_dw and source.q is None:
            raise ValueError("a weight gradient needs an input that was announced with keep=True")
        self.source = source
        self.dtype = g_masked.dtype
        self.count = g_masked.numel() // max(1, g_masked.shape[1])
        kernel = source.weight.from_inputs if want_dx else None
        q = source.q if want_dw else None
        self.dx, self.dw = source.weight.form.gradients(g_masked, kernel, q, source.shape, tally)

    def input_gradient(self, dx_masked: Tensor, into: Tensor | None = None) -> Residual:
        """Check ``dx~``, and copy it ``into`` in the same pass: see `InputCheck.output`."""
        weight = self.source.weight
        return self._input_gradient(weight.form.rows(dx_masked, into, weight.v), dx_masked.dtype)

    def input_gradient_check(self) -> AnswerCheck:
        """What judges ``dx~``."""
        weight = self.source.weight
        return AnswerCheck(self.input_gradient, weight.form.summed_with(weight.v), self._input_gradient)

    def _input_gradient(self, found: Sums, dtype: torch.dtype) -> Residual:
        weight = self.source.weight
        if self.dx is None:
            raise ValueError("no input gradient was announced")
        inner, width = weight.r.shape[2] * prod(weight.shape[2:]), weight.shape[1]
        rounding = Rounding(inner, width, weight.work, _coarsest(self.dtype, weight.dtype, dtype))
        return _compare(self.dx, weight.length, rounding, found, weight.drift)

    def weight_gradient(self, dw_masked: Tensor, into: Tensor | None = None) -> Residual:
        """Check ``dw~``, and copy it ``into`` in the same pass: see `InputCheck.output`."""
        if self.source.z is None:
            raise ValueError("no weight gradient was announced")
        return self._weight_gradient(self.source.weight.form.features(dw_masked, into, self.source.z), dw_masked.dtype)

    def weight_gradient_check(self) -> AnswerCheck:
        """What judges ``dw~``."""
        weight, z = self.source.weight, self.source.z
        # With several taps it is no matrix to whoever unmasks it: that would be done twice.
        vectors = weight.form.summed_with(z) if z is not None and prod(weight.shape[2:]) == 1 else None
        return AnswerCheck(self.weight_gradient, vectors, self._weight_gradient)

    def _weight_gradient(self, found: Sums, dtype: torch.dtype) -> Residual:
        source = self.source
        if self.dw is None or source.z is None:
            raise ValueError("no weight gradient was announced")
        rounding = Rounding(
            self.count, source.z.shape[2], source.weight.work, _coarsest(self.dtype, source.dtype, dtype)
        )
        return _compare(self.dw, source.length, rounding, found)


def _draw(key: Key, use: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    return gaussians(key.stream(use), prod(shape), dtype).view(shape)


@cache
def _coarsest(a: torch.dtype, b: torch.dtype, answer: torch.dtype) -> torch.dtype:
    """Workers round once into the dtype they compute in, and then into the answer's."""
    return max(torch.promote_types(a, b), answer, key=lambda dtype: torch.finfo(dtype).eps)


def _compare(expected: Sums, length: Tensor, rounding: Rounding, found: Sums, drift: float = 0.0) -> Residual:
    """The worst row of an answer.

    Args:
        expected: Sums of its rows, and lengths of those of one operand.
        length: Of the other operand, by group if there are any.
        rounding: Of rows.
        found: Sums of what came.
        drift: How far the other operand may be from what is known of it.
    """
    lengths, allowed = expected.lengths, threshold(expected.sums.shape[-2])
    if not lengths.numel():
        return Residual()
    native = kernels.native() if expected.sums.dtype == torch.float32 else None
    if native is not None:
        groups, rows = length.numel(), lengths.shape[-1]
        worst, at, off, tolerated, unchecked = native.compare(
            found.sums.view(groups, -1, rows),
            expected.sums.view(groups, -1, rows),
            lengths.view(groups, rows),
            length.view(groups),
            found.lengths.view(groups, rows),
            rounding.terms(),
            drift,
            allowed,
            rounding.finite_below,
        )
    else:
        residual = (found.sums - expected.sums).double().square_().sum(-2).sqrt_()
        scale, drifted = lengths * length, lengths * drift if drift else None
        tolerance = rounding.error_norm(scale, found.lengths, drifted).mul_(allowed)
        ratio = residual / tolerance
        lost = ~(torch.isfinite(residual) & torch.isfinite(tolerance))
        free = lost & ~(scale < rounding.finite_below)
        ratio.masked_fill_(lost, inf).masked_fill_(free, 0.0)
        at, unchecked = int(ratio.argmax()), int(free.sum())
        worst, off, tolerated = (float(values.view(-1)[at]) for values in (ratio, residual, tolerance))
    row = (at,) if lengths.dim() == 1 else divmod(at, lengths.shape[1])
    return Residual(worst, row, off, tolerated, lengths.numel(), unchecked)

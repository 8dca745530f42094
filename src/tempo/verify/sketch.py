"""Sketches of a weight that its worker changes itself: what it has to be, seen through a few secret vectors.

``a = w~ᵀ r`` and ``b = w~ v`` are linear in ``w~``, and so is a step of gradient descent, with momentum, dampening,
Nesterov's or decay: the same step on sketches of weight, momentum and gradient gives the sketches of what comes out. Of
the gradient ``dW~ = P Gᵀ X A^-1`` the trusted side knows ``X`` and ``G``; under it, ``L`` cancels.

**Drift.** An honest worker's weight parts from the sketched one by rounding. Errors ``E`` of weight, momentum and
gradient go through a step as these do, so their squared lengths and inner products are kept, and ``C = M C Mᵀ + new``
follows them exactly, momentum's ``1/(1-μ)`` and what decay takes back included. New errors, under the model of
`tempo.verify.tolerance`, per step:

* A sum rounds each element of the weight by at most ``u`` of it, and by no more than the change: an element that is not
  changed is exact. Where changes are the same from step to step, within rounding, errors are too, and add up: those of
  a step count as continuing the last one's in the proportion of rounding to the difference between both changes. Taken
  feature by feature, since of dead ones only decay is left; of input or output features, whichever gives more.
* The gradient is summed over T rows, in their order or (row masks) a random one: partial sums are as long as those seen
  here at the end of each piece of rows, and what the rows of a piece can add. Operands were rounded when masked.
* Momentum and gradient are rounded by ``u`` of their length at each operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import hypot, inf, isfinite, sqrt
from typing import Final

import torch
from torch import Tensor

from tempo.keys import Key
from tempo.schemes.masks import Mask, Masks
from tempo.verify.checks import VECTORS, Residual, WeightCheck
from tempo.verify.forms import Matrices
from tempo.verify.norms import lengths
from tempo.verify.tolerance import Rounding, between, threshold
from tempo.wire.messages import Linear, Rule, Sgd
from tempo.worker.update import apply

_PIECE: Final = 1 << 18
"""Elements of ``X`` and ``G`` read at a time: what stays in a core's cache."""
_FOLLOWED: Final = ("w", "momentum_buffer", "gradient")
"""What has errors, in the order of the rows of ``C``."""


class Sketch:
    """What is kept of a masked weight that a worker changes, to check products with it, and itself when it is fetched.

    Args:
        w_masked: The weight as sent, (m, d), of a `Linear` product.
        key: Fresh, and of this weight and worker alone, as for `WeightCheck`.
        state: What an optimizer kept of it, as sent, under the names of `tempo.worker.update`.
        gradient: Its gradient so far, as sent.
        vectors: How many secret vectors of each kind.

    Raises:
        ValueError: The state is of an optimizer that is not linear.

    Attributes:
        check: For products with the weight as it is now.
    """

    def __init__(
        self,
        w_masked: Tensor,
        key: Key,
        state: Mapping[str, Tensor] | None = None,
        gradient: Tensor | None = None,
        vectors: int = VECTORS,
    ) -> None:
        if unknown := set(state or {}) - {"momentum_buffer"}:
            raise ValueError(f"no sketch follows {', '.join(sorted(unknown))}")
        self.check = WeightCheck(Linear(), w_masked, key, vectors)
        self._u = hypot(torch.finfo(w_masked.dtype).eps, torch.finfo(torch.float64).eps) / 2  # a worker's and ours
        self._form = Matrices(torch.float64)
        self._r, self._v = self.check.r.double(), self.check.v.double()
        self._unmasked: tuple[Mask, Mask, Tensor, Tensor] | None = None
        self._w, _ = self._seen(w_masked)
        self._state = {name: self._seen(kept)[0] for name, kept in (state or {}).items()}
        self._gradient: Tensor | None = None
        self._longest = 0.0
        if gradient is not None:
            self._gradient, self._longest = self._seen(gradient)
        self._missed = float(self.check.length) ** 2 - self._length(self._w) ** 2
        self._errors = torch.zeros(3, 3, dtype=torch.float64)
        self._change, self._alike = torch.zeros_like(self._w), torch.zeros_like(self._w[0])

    @torch.no_grad()
    def accumulate(self, x: Tensor, g: Tensor, masks: Masks) -> None:
        """Add ``dW~`` to the gradient.

        Args:
            x: Plain ``X``, (T, d): all rows that were masked, those that cover others included.
            g: Plain ``G``, (T, m), likewise.
            masks: ``A`` and ``P`` of the weight, orthogonal; ``L`` of these rows, which only counts for rounding.
        """
        r, v = self._of_plain(masks)
        outputs, inputs = (torch.zeros(t.shape, dtype=torch.float64) for t in (v, r))
        partial = sum_of_lengths = sum_of_squares = 0.0
        step = max(1, _PIECE // (x.shape[1] + g.shape[1]))
        for start in range(0, len(x), step):
            rows_x, rows_g = (t[start : start + step].to(self.check.work) for t in (x, g))
            of_rows = lengths(rows_x, 1) * lengths(rows_g, 1)
            piece = float(of_rows.sum())
            partial = max(partial, float(outputs.norm()) / sqrt(len(r)) + piece)
            sum_of_lengths += piece
            sum_of_squares += float(of_rows.square().sum())
            outputs += (r @ rows_g.t()) @ rows_x
            inputs += (v @ rows_x.t()) @ rows_g
        masked, features = torch.empty_like(self._w), Masks(A=masks.A, P=masks.P)
        of_outputs, of_inputs = self._split(masked)
        features.encode("x", outputs, of_outputs)
        features.encode("g", inputs, of_inputs)
        self._gradient = masked if self._gradient is None else self._gradient.add_(masked)
        self._longest += sum_of_lengths
        mixed = sum(stage.batches[0].shape[1] for mask in (masks.L, masks.A, masks.P) for stage in mask.blocks)
        steps = 2 * (len(x) + mixed) + x.shape[1] + g.shape[1]
        summed = steps * (torch.finfo(self.check.work).eps / 2) ** 2 * (partial**2 + sum_of_squares)
        self._errors[2, 2] += summed + 2 * (self._u * self._length(self._gradient)) ** 2

    def discard(self) -> None:
        """The gradient is dropped."""
        self._gradient, self._longest = None, 0.0
        self._errors[2] = self._errors[:, 2] = 0.0

    @torch.no_grad()
    def update(self, rule: Rule, scale: float = 1.0) -> None:
        """The weight is changed by its gradient times ``scale``, which is dropped: see `tempo.worker.update.apply`.

        Raises:
            ValueError: The rule is not linear, or there is no gradient.
        """
        if not isinstance(rule, Sgd):
            raise ValueError(f"no sketch follows {type(rule).__name__}: its step is not linear in the gradient")
        if self._gradient is None:
            raise ValueError("there is no gradient to update by")
        rule, scale = self._as_computed(rule), self._rounded(scale)
        before, gradient = self._w.clone(), self._gradient.mul_(scale)
        decayed = gradient + rule.weight_decay * before
        self._errors[2, 2] *= scale**2
        self._errors[:2, 2] *= scale
        self._errors[2, :2] *= scale
        self._errors[2, 2] += self._u**2 * (self._length(gradient) ** 2 + self._length(decayed) ** 2)
        self._errors = _carried(self._errors, rule, self._state)
        apply(rule, self._w, gradient, self._state)
        self._round(self._w - before)
        self.discard()
        check = self.check
        check.from_outputs, check.from_inputs = (part.to(check.work, copy=True) for part in self._split(self._w))
        seen = self._length(self._w) ** 2
        # Either is right on average. What sketches miss of the weight as sent is known; but that may have decayed.
        check.length = check.length.new_tensor(sqrt(max(seen, seen + self._missed)))
        check.drift = self._drift("w")

    def compare(self, name: str, fetched: Tensor, into: Tensor | None = None) -> Residual:
        """Check what was fetched: ``w``, a state by its name, or ``gradient``; of its copy ``into``, if given.

        Returns:
            Residual of all of it; ``row`` is the output feature where it is largest.

        Raises:
            ValueError: Nothing is known under this name.
        """
        expected = {"w": self._w, "gradient": self._gradient, **self._state}.get(name)
        if expected is None:
            raise ValueError(f"no {name!r} is kept of this weight")
        seen, norm = self._seen(fetched if into is None else into.copy_(fetched))
        off = seen - expected
        features = self._split(off)[1].norm(dim=0)
        residual = max(float(part.norm()) for part in self._split(off))
        length = torch.tensor(norm, dtype=torch.float64)
        own = Rounding(sum(fetched.shape), 1, torch.float64, torch.float64).error_norm(length, length)
        tolerance = threshold(self.check.vectors) * hypot(float(own), self._drift(name))
        row = (int(features.argmax()),)
        if isfinite(residual) and isfinite(tolerance):
            return Residual(residual / tolerance, row, residual, tolerance, len(fetched))
        free = not bool(expected.isfinite().all())
        return Residual(0.0 if free else inf, row, residual, tolerance, len(fetched), len(fetched) if free else 0)

    def bounds(self) -> tuple[float, float]:
        """Between what the gradient's length is.

        Of a gradient of rank one, the worst case, sketches show ``2k`` Gaussian numbers as long as it is: at either end
        it is outside once in ``1 / FALSE_ALARM`` times. It is never longer than the sum of all rows' ``‖x‖ ‖g‖``.

        Raises:
            ValueError: There is no gradient.
        """
        if self._gradient is None:
            raise ValueError("there is no gradient")
        least, most = between(2 * self.check.vectors)
        seen, drift = float(self._gradient.norm()), threshold(self.check.vectors) * self._drift("gradient")
        return max(0.0, seen / most - drift), min(seen / least, self._longest) + drift

    def plausible(self, norm: float) -> bool:
        """Whether ``norm`` may be the gradient's length."""
        low, high = self.bounds()
        return low <= norm <= high

    def _seen(self, masked: Tensor) -> tuple[Tensor, float]:
        """Sketches of ``masked`` (m, d), side by side, (k, d + m); its Frobenius norm."""
        from_outputs, from_inputs, length = self._form.weight(masked, self._r, self._v)
        return torch.cat([from_outputs, from_inputs], 1), float(length)

    def _split(self, seen: Tensor) -> tuple[Tensor, ...]:
        """``seen`` from outputs (k, d), and from inputs (k, m)."""
        parts: tuple[Tensor, ...] = seen.split(list(self.check.shape[::-1]), 1)
        return parts

    def _length(self, seen: Tensor) -> float:
        """An estimate of the Frobenius norm of what ``seen`` is a sketch of."""
        return float(seen.norm()) / sqrt(2 * len(seen))

    def _of_plain(self, masks: Masks) -> tuple[Tensor, Tensor]:
        """``rᵀ P`` (k, m) and ``A^-1 v`` (k, d): they see of the plain gradient what ``r`` and ``v`` see of ``dW~``."""
        known = self._unmasked
        if known is None or known[0] is not masks.A or known[1] is not masks.P:
            features, r, v = Masks(A=masks.A, P=masks.P), torch.empty_like(self._r[0]), torch.empty_like(self._v[0])
            features.decode("y", self._r[0], [r])
            features.decode("dx", self._v[0], [v])
            known = self._unmasked = masks.A, masks.P, r.to(self.check.work), v.to(self.check.work)
        return known[2:]

    def _as_computed(self, rule: Sgd) -> Sgd:
        """With numbers as the worker's arithmetic takes them: what they lack would be missed in every step alike."""
        return Sgd(
            lr=self._rounded(rule.lr),
            momentum=self._rounded(rule.momentum),
            dampening=1 - self._rounded(1 - rule.dampening),
            weight_decay=self._rounded(rule.weight_decay),
            nesterov=rule.nesterov,
            maximize=rule.maximize,
        )

    def _rounded(self, number: float) -> float:
        return float(torch.tensor(number, dtype=self.check.work))

    def _round(self, change: Tensor) -> None:
        """Errors that a step's last operations add."""
        of_w, of_change, apart = (_lengths(seen) for seen in (self._w, change, change - self._change))
        error = torch.minimum(self._u * of_w, of_change)
        self._alike = error + self._alike * (error / apart).nan_to_num_(1.0).clamp_(max=1.0)
        added = error * (2 * self._alike - error)
        self._errors[0, 0] += max(float(part.sum()) for part in added.split(list(self.check.shape[::-1])))
        self._errors[0, 0] += 2 * (self._u * self._length(change)) ** 2
        if "momentum_buffer" in self._state:
            self._errors[1, 1] += 2 * (self._u * self._length(self._state["momentum_buffer"])) ** 2
        self._change = change

    def _drift(self, name: str) -> float:
        """How far an honest worker's may be from the sketched one."""
        square = self._errors.diagonal()[_FOLLOWED.index(name)]
        return float(square.clamp(min=0).sqrt())


def _lengths(seen: Tensor) -> Tensor:
    """Estimates of the lengths of all input features (d), then of all output features (m)."""
    found: Tensor = seen.norm(dim=0) / sqrt(len(seen))
    return found


def _carried(errors: Tensor, rule: Sgd, state: Mapping[str, Tensor]) -> Tensor:
    """``M C Mᵀ``, where column ``i`` of ``M`` is what a step makes of a one in place ``i``."""
    w, momentum, gradient = torch.eye(3, dtype=torch.float64)
    kept = {"momentum_buffer": momentum} if "momentum_buffer" in state else {}
    apply(rule, w, gradient, kept)
    step = torch.stack([w, kept.get("momentum_buffer", torch.zeros_like(w)), torch.zeros_like(w)])
    return step @ errors @ step.mT

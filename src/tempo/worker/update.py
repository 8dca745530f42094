"""Optimizers applied to one stored weight, by PyTorch's own functions where it has them.

Everything here is element-wise, or commutes with rotations, so it may run on masked weights (docs/decisions/0016); the
trusted side runs the same on what it keeps of them, to know what they have to become.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from tempo.wire.messages import Adam, Lion, Muon, Rule, Sgd

STATES: Final = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""All that an optimizer may keep of a weight, under PyTorch's names; each has the weight's shape and dtype."""


def states(rule: Rule) -> tuple[str, ...]:
    """Which of `STATES` ``rule`` keeps."""
    match rule:
        case Sgd():
            return ("momentum_buffer",) if rule.momentum else ()
        case Adam():
            return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if rule.amsgrad else ()))
        case Lion():
            return ("exp_avg",)
        case Muon():
            return ("momentum_buffer",)


def check(rule: Rule, w: Tensor) -> None:
    """Whether ``rule`` may be applied to ``w`` at all.

    Raises:
        ValueError: A hyper-parameter is not finite or out of range, or ``w`` is not what the rule is for.
    """
    name = type(rule).__name__
    fields = msgspec.structs.asdict(rule)
    for field, value in fields.items():
        if not all(map(math.isfinite, value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} with {field} {value}")
        if field.startswith("beta") and not 0 <= value < 1:
            raise ValueError(f"{name} with {field} {value}, which is not in [0, 1)")
    if not w.is_floating_point():
        raise ValueError(f"{name} on a weight of {w.dtype}")
    if isinstance(rule, Muon) and w.dim() != 2:
        raise ValueError(f"Muon is for matrices, the weight has {w.dim()} axes")


@torch.no_grad()
def apply(rule: Rule, w: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    """One step of ``rule``, which passes `check`, on ``w``, in place.

    Args:
        rule: The optimizer and its hyper-parameters in this step.
        w: The weight.
        gradient: Of its shape and dtype; stays as it is.
        state: What the optimizer keeps, under the names of `states`; changed in place, what is missing is filled in.
    """
    match rule:
        case Sgd():
            _sgd(rule, w, gradient, state)
        case Adam():
            _adam(rule, w, gradient, state)
        case Lion():
            _lion(rule, w, gradient, state)
        case Muon():
            _muon(rule, w, gradient, state)


def _sgd(rule: Sgd, w: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    buffers = [state.get("momentum_buffer")]  # not zeros at first: the first gradient is taken whole, undampened
    sgd(
        [w],
        [gradient],
        buffers,
        foreach=False,
        weight_decay=rule.weight_decay,
        momentum=rule.momentum,
        lr=rule.lr,
        dampening=rule.dampening,
        nesterov=rule.nesterov,
        maximize=rule.maximize,
    )
    if buffers[0] is not None:
        state["momentum_buffer"] = buffers[0]


def _adam(rule: Adam, w: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    first, second, *largest = (_kept(state, name, w) for name in states(rule))
    adam(
        [w],
        [gradient],
        [first],
        [second],
        largest,
        [torch.tensor(float(rule.steps))],
        foreach=False,
        amsgrad=rule.amsgrad,
        decoupled_weight_decay=rule.decoupled,
        beta1=rule.beta1,
        beta2=rule.beta2,
        lr=rule.lr,
        weight_decay=rule.weight_decay,
        eps=rule.eps,
        maximize=rule.maximize,
    )


def _lion(rule: Lion, w: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    """Chen et al., Symbolic Discovery of Optimization Algorithms (arXiv 2302.06675), algorithm 2."""
    average = _kept(state, "exp_avg", w)
    w.mul_(1 - rule.lr * rule.weight_decay)
    w.add_(torch.lerp(gradient, average, rule.beta1).sign_(), alpha=-rule.lr)
    average.lerp_(gradient, 1 - rule.beta2)


def _muon(rule: Muon, w: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    """As `torch.optim.Muon`, but for the iteration's precision: see `orthogonalised`."""
    buffer = _kept(state, "momentum_buffer", w)
    buffer.lerp_(gradient, 1 - rule.momentum)
    update = gradient.lerp(buffer, rule.momentum) if rule.nesterov else buffer
    update = orthogonalised(update, rule.coefficients, rule.iterations, rule.eps)
    w.mul_(1 - rule.lr * rule.weight_decay)
    w.add_(update, alpha=-rule.adjusted_lr)


def _kept(state: dict[str, Tensor], name: str, w: Tensor) -> Tensor:
    """What is kept under ``name``: zeros at first."""
    if name not in state:
        state[name] = torch.zeros_like(w)
    return state[name]


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float) -> Tensor:
    """``matrix`` with its singular values moved towards 1, by the Newton-Schulz iteration of Jordan et al. (2024).

    In the matrix's own precision: `torch.optim.Muon` rounds to bfloat16, and rounding that coarse shows which axes the
    matrix is written in, so that masked and plain training would part.
    """
    a, b, c = coefficients
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / torch.linalg.matrix_norm(x).clamp(min=eps)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x

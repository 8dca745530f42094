"""Optimizers applied to one stored weight, by PyTorch's own functions where it has them.

Everything here is element-wise, or commutes with rotations, so it may run on masked weights (docs/decisions/0016); the
trusted side runs the same on what it keeps of them, to know what they have to become.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from tempo.wire.messages import Adam, Lion, Muon, Rule, Sgd


@torch.no_grad()
def apply(rule: Rule, w: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    """One step of ``rule`` on ``w``, in place.

    Args:
        rule: The optimizer and its hyper-parameters in this step.
        w: The weight.
        gradient: Of its shape and dtype; may be changed.
        state: What the optimizer keeps, under PyTorch's names; filled in at the first step.
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
    buffers = [state.get("momentum_buffer")]
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
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if rule.amsgrad else [])]
    first, second, *largest = (state.setdefault(name, torch.zeros_like(w)) for name in names)
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
    average = state.setdefault("exp_avg", torch.zeros_like(w))
    w.mul_(1 - rule.lr * rule.weight_decay)
    w.add_(torch.lerp(gradient, average, rule.beta1).sign_(), alpha=-rule.lr)
    average.lerp_(gradient, 1 - rule.beta2)


def _muon(rule: Muon, w: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    """As `torch.optim.Muon`, but for the iteration's precision: see `orthogonalised`."""
    buffer = state.setdefault("momentum_buffer", torch.zeros_like(w))
    buffer.lerp_(gradient, 1 - rule.momentum)
    update = gradient.lerp(buffer, rule.momentum) if rule.nesterov else buffer
    update = orthogonalised(update, rule.coefficients, rule.iterations, rule.eps)
    w.mul_(1 - rule.lr * rule.weight_decay)
    w.add_(update, alpha=-rule.adjusted_lr)


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

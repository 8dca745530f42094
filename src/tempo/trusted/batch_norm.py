"""BatchNorm of maps whose channels lie last, with a residual and ReLU in the same pass, if they follow."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tempo import kernels
from tempo.trusted.kernels import differentiated, hooked, native_for, recomputes

_SAMPLED: Final = 64
"""Rows whose mean is taken off before squares are summed, or these would lose what a large mean leaves of digits."""


def batch_norm(
    input: Tensor,  # noqa: A002 - the names that PyTorch uses
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor | None:
    """As `torch.nn.functional.batch_norm`, plus ``residual``, through ReLU if ``relu``.

    Returns:
        None where PyTorch has to compute it; then nothing was changed.
    """
    x = input
    given = [t for t in (weight, bias, running_mean, running_var, residual) if t is not None]
    native = native_for(x, *given)
    if native is None or recomputes() or weight is None or bias is None or x.dim() < 2 or not _rows_lie(x):
        return None
    if residual is not None and (residual.shape != x.shape or not _rows_lie(residual)):
        return None
    if any(t.shape != x.shape[1:2] for t in (weight, bias, running_mean, running_var) if t is not None):
        return None
    if training:
        count = x.numel() // x.shape[1]
        if count == 1:
            return None  # an error, which PyTorch words
        mean, variance = _moments(native, x)
        if running_mean is not None:
            running_mean.detach().mul_(1 - momentum).add_(mean.float(), alpha=momentum)
        if running_var is not None:
            unbiased = (variance * (count / (count - 1))).float()
            running_var.detach().mul_(1 - momentum).add_(unbiased, alpha=momentum)
    elif running_mean is None or running_var is None:
        return None
    else:
        mean, variance = running_mean.double(), running_var.double()
    inverse = (variance + eps).rsqrt().float()
    y: Tensor = _BatchNorm.apply(x, weight, bias, residual, mean.float(), inverse, (training, eps, relu), native)
    return y


class _BatchNorm(torch.autograd.Function):
    """Keeps ``x``, and ``y`` where ReLU was of a sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        mean: Tensor,
        inverse: Tensor,
        how: tuple[bool, float, bool],
        native: ModuleType,
    ) -> Tensor:
        *_, relu = ctx.how = how
        scale = weight.detach() * inverse
        shift = bias.detach() - mean * scale
        y = torch.empty_like(x)
        rows, added, out = _rows(x), None if residual is None else _rows(residual), _rows(y)

        def part(which: slice) -> None:
            native.normalize(rows[which], None if added is None else added[which], scale, shift, relu, out[which])

        kernels.rows_in_parts(part, *rows.shape)
        ctx.of_sum = residual is not None
        keeps_y = relu and ctx.of_sum
        ctx.save_for_backward(x, weight, bias, residual, mean, inverse, y if keeps_y else None)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, mean, inverse, y = ctx.saved_tensors
        training, _, relu = ctx.how
        native = native_for(x, weight, bias, g)
        if torch.is_grad_enabled() or native is None:
            operands = [x, weight, bias, *([residual] if ctx.of_sum else [])]
            function = _by_torch(mean, inverse, ctx.how)
            found = differentiated(function, operands, ctx.needs_input_grad[: len(operands)], g)
            return *found, *[None] * (8 - len(operands))
        scale = weight.detach() * inverse
        shift = bias.detach() - mean * scale if relu and not ctx.of_sum else None
        rows, given = _rows(x), _rows(g.movedim(1, -1).contiguous().movedim(-1, 1))
        gave, passed = (None, None) if y is None else (_rows(y), torch.empty_like(given))
        sums = _sums(native, rows, mean, given, gave, None if shift is None else scale, shift, passed)
        inverses = inverse.double()
        dresidual = None
        if ctx.of_sum:
            dresidual = g if passed is None else _like(passed, x)
        dx = None
        if ctx.needs_input_grad[0]:
            of_batch: tuple[Tensor | None, ...] = (None, None, None)
            if training:
                of_g, of_product = (sums / rows.shape[0]).unbind()
                of_batch = mean, (of_product * inverses.square()).float(), of_g.float()
            source, out = given if passed is None else passed, torch.empty_like(given)

            def part(which: slice) -> None:
                native.normalize_gradient(rows[which], source[which], scale, shift, *of_batch, out[which])

            kernels.rows_in_parts(part, *rows.shape)
            dx = _like(out, x)
        return dx, (sums[1] * inverses).float(), sums[0].float(), dresidual, None, None, None, None


def _by_torch(mean: Tensor, inverse: Tensor, how: tuple[bool, float, bool]) -> Callable[..., Tensor]:
    training, eps, relu = how

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        if training:
            y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
        else:  # running statistics may be others by now
            by_channel = (-1, *[1] * (x.dim() - 2))
            scale = (weight * inverse).view(by_channel)
            y = (x - mean.view(by_channel)) * scale + bias.view(by_channel)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y

    return function


def _moments(native: ModuleType, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, float64."""
    rows = _rows(x)
    center = rows[:: max(1, rows.shape[0] // _SAMPLED)].mean(0)
    first, second = (_sums(native, rows, center) / rows.shape[0]).unbind()
    return center + first, (second - first.square()).clamp_(min=0)


def _sums(native: ModuleType, x: Tensor, center: Tensor, *gradient: Tensor | None) -> Tensor:
    """What `sum_channels` adds up of all rows (2, channels), float64; ``gradient``: its other operands."""
    g, y, scale, shift, passed = gradient or [None] * 5
    found = {}

    def part(which: slice) -> None:
        found[which.start] = of_part = torch.zeros(2, x.shape[1], dtype=torch.float64)
        of_rows = [None if t is None else t[which] for t in (x, g, y, passed)]
        native.sum_channels(*of_rows[:3], center, scale, shift, of_rows[3], of_part)

    kernels.rows_in_parts(part, *x.shape)
    return torch.stack([found[first] for first in sorted(found)]).sum(0)


def _rows_lie(x: Tensor) -> bool:
    """Whether channels lie side by side in memory."""
    return x.movedim(1, -1).is_contiguous()


def _rows(x: Tensor) -> Tensor:
    """Pixels of all images by channels: a view."""
    return x.detach().movedim(1, -1).view(-1, x.shape[1])


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """What `_rows` made of a tensor of the shape of ``x``, as that tensor."""
    return rows.view(x.movedim(1, -1).shape).movedim(-1, 1)


class _Followed(TorchFunctionMode):
    """Within it, BatchNorm adds ``residual`` to what it gives, and takes ReLU of that."""

    def __init__(self, residual: Tensor | None) -> None:
        super().__init__()
        self.residual = residual

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """``func``, or what it is with all that follows."""
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():  # or a mode around this one would be asked about each of its operations
            y = batch_norm(*args, **(kwargs or {}), residual=self.residual, relu=True)
        if y is None:
            y = func(*args, **(kwargs or {}))
            y = F.relu(y if self.residual is None else y + self.residual)
        return y


def takes_relu(norm: nn.Module, activation: nn.Module, *between: nn.Module) -> bool:
    """Whether ``norm`` may take ``activation``, and what is ``between``, on itself: nobody looks in between."""
    modules = (norm, activation, *between)
    return (
        type(norm).forward is nn.BatchNorm2d.forward
        and type(activation) is nn.ReLU
        and not any(hooked(module) or "forward" in vars(module) for module in modules)
    )


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``relu(norm(x) + residual)``, where `takes_relu`."""
    with _Followed(residual):
        y: Tensor = norm(x)
    return y

"""The norm of Llama-like models in one pass each way: as it is written there, it takes six and a dozen."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tempo import kernels
from tempo.layers.base import Protected
from tempo.trusted.kernels import differentiated, native_for


class RmsNorm(Protected):
    """Mixin for LlamaRMSNorm of ``transformers`` and the classes like it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As theirs."""
        plain: Any = super()
        layer: Any = self
        x, weight = hidden_states, layer.weight
        native = native_for(x, weight)
        if native is None or not x.is_contiguous() or weight.shape != x.shape[-1:]:
            y: Tensor = plain.forward(x)
        else:
            y = _RmsNorm.apply(x, weight, float(layer.variance_epsilon), native)
        return y

    @staticmethod
    def written(self: Any, hidden_states: Any) -> Any:  # noqa: D102 - theirs
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


def _by_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, native: ModuleType) -> Tensor:
        y, inverse = torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1])
        _run(native, x, weight, None, y, inverse, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        native = native_for(x, weight, g)
        if torch.is_grad_enabled() or native is None:
            needs = ctx.needs_input_grad[:2]
            return *differentiated(lambda x, w: _by_torch(x, w, ctx.eps), (x, weight), needs, g), None, None
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            _run(native, x.contiguous(), weight, g.contiguous(), dx, inverse, ctx.eps)
        if ctx.needs_input_grad[1]:
            dw = (g * x).flatten(0, -2).mul_(inverse[:, None]).sum(0)
        return dx, dw, None, None


def _run(
    native: ModuleType, x: Tensor, weight: Tensor, g: Tensor | None, out: Tensor, inverse: Tensor, eps: float
) -> None:
    width = x.shape[-1]
    x, out = x.detach().view(-1, width), out.view(-1, width)
    g, weight = None if g is None else g.detach().view(-1, width), weight.detach().contiguous()

    def part(rows: slice) -> None:
        native.rms_norm(x[rows], weight, None if g is None else g[rows], out[rows], inverse[rows], eps)

    kernels.rows_in_parts(part, *x.shape)

"""The gated layers of Llama-like models: ``silu(gate) · up`` in one pass each way, nothing kept but the two."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from tempo import kernels
from tempo.layers.base import Protected
from tempo.trusted.activations import AT_ONCE, by_torch
from tempo.trusted.kernels import differentiated, hooked, native_for

_ACTIVATIONS: Final = {
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
}


class GatedMlp(Protected):
    """Mixin for LlamaMLP of ``transformers`` and the classes like it."""

    def forward(self, x: Tensor) -> Tensor:
        """As theirs."""
        plain: Any = super()
        layer: Any = self
        act = layer.act_fn
        name = _ACTIVATIONS.get(f"{type(act).__module__}.{type(act).__qualname__}")
        if name is None or hooked(act) or "forward" in vars(act):
            result: Tensor = plain.forward(x)
            return result
        result = layer.down_proj(gated(name, layer.gate_proj(x), layer.up_proj(x)))
        return result

    @staticmethod
    def written(self: Any, x: Any) -> Any:  # noqa: D102 - theirs
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, name: str, native: ModuleType) -> Tensor:
        ctx.save_for_backward(x, up)
        ctx.name = name
        y = torch.empty_like(x)
        _run(native, name, x, up, None, y, None)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, up = ctx.saved_tensors
        native = native_for(x, up, g)
        if torch.is_grad_enabled() or native is None:
            needs = ctx.needs_input_grad[:2]
            return *differentiated(lambda x, up: by_torch(ctx.name, x) * up, (x, up), needs, g), None, None
        dx, dup = torch.empty_like(x), torch.empty_like(up)
        _run(native, ctx.name, x.contiguous(), up.contiguous(), g.contiguous(), dx, dup)
        return dx, dup, None, None


def _run(
    native: ModuleType, name: str, x: Tensor, up: Tensor, g: Tensor | None, out: Tensor, dup: Tensor | None
) -> None:
    operands = [None if t is None else t.detach().view(-1) for t in (x, up, g, out, dup)]

    def part(first: int, last: int) -> None:
        native.gated(name, *(None if t is None else t[first:last] for t in operands))

    kernels.in_parts(part, x.numel(), AT_ONCE)


def gated(name: str, x: Tensor, up: Tensor) -> Tensor:
    """The activation ``name`` of ``x``, times ``up``, of one shape."""
    native = native_for(x, up)
    if native is None or x.shape != up.shape or not (x.is_contiguous() and up.is_contiguous()):
        return by_torch(name, x) * up
    y: Tensor = _Gated.apply(x, up, name, native)
    return y

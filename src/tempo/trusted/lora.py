"""PEFT's LoRA in fewer passes: ``base(x) + s (x Aᵀ) Bᵀ`` as one product that is added to the base's output.

PEFT takes three passes over an output for the product, its scale and the sum, and as many over its gradient. Where more
is asked (several adapters, variants such as DoRA, dropout, other dtypes, hooks), PEFT's own code runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tempo.layers.base import Protected
from tempo.trusted.kernels import hooked, native_for


class FusedLora(Protected):
    """Mixin for ``peft.tuners.lora.Linear``."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, but for rounding."""
        plain: Any = super()
        adapter = None if args or kwargs else _alone(self, x)
        if adapter is None:
            result: Tensor = plain.forward(x, *args, **kwargs)
            return result
        layer: Any = self
        base, low = layer.base_layer(x), layer.lora_A[adapter](x)
        up: Any = layer.lora_B[adapter]
        if hasattr(up, "_tempo"):
            up._tempo.computed(low.numel() // low.shape[-1], up.weight)
        b = up.weight * layer.scaling[adapter]
        if _ours(layer.base_layer) and native_for(base, low, b) is not None:
            y: Tensor = _Added.apply(base, low, b)
            return y
        return torch.addmm(base.flatten(0, -2), low.flatten(0, -2), b.t()).view(base.shape)


class _Added(torch.autograd.Function):
    """``base + low bᵀ`` in the memory of ``base``, which nobody else may use: a copy would be a pass more."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, low: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(low, b)
        return base.detach().flatten(0, -2).addmm_(low.flatten(0, -2), b.t()).view(base.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        low, b = ctx.saved_tensors
        needs_low, needs_b = ctx.needs_input_grad[1:]
        dlow = g @ b if needs_low else None
        db = g.flatten(0, -2).t() @ low.flatten(0, -2) if needs_b else None
        return g, dlow, db


def _ours(base: nn.Module) -> bool:
    """Whether what ``base`` returns is new, and seen by its caller only."""
    original = getattr(type(base), "_tempo_original", None)
    known = original is nn.Linear or getattr(original, "__module__", "") == "transformers.pytorch_utils"
    return known and not hooked(base) and "forward" not in vars(base)


def _alone(layer: Any, x: Tensor) -> str | None:
    """The one adapter that is to be added, if it is a plain one."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or torch.is_autocast_enabled(x.device.type):
        return None
    (name,) = active
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    dtypes = {x.dtype, a.weight.dtype, b.weight.dtype, layer.get_base_layer().weight.dtype}
    drops = dropout.training and not isinstance(dropout, nn.Identity)
    if len(dtypes) > 1 or drops or hooked(b) or b.bias is not None or name in layer.lora_variant:
        return None
    return str(name)

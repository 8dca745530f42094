"""PEFT's LoRA in fewer passes: ``base(x) + s (x Aᵀ) Bᵀ``, added where the base's output is decoded.

PEFT takes three passes over an output for the product, its scale and the sum, and as many over its gradient. Where the
base stays here, both are one product that is added to its output. Where more is asked (several adapters, variants such
as DoRA, dropout, other dtypes, hooks), PEFT's own code runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempo.engine.adapters import Adapter
from tempo.layers.base import Protected
from tempo.schemes.low_rank import adapter_dtype
from tempo.trusted.kernels import hooked, native_for


class FusedLora(Protected):
    """Mixin for ``peft.tuners.lora.Linear``."""

    @torch.compiler.disable
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, but for rounding."""
        plain: Any = super()
        layer: Any = self
        base, dtype = layer.base_layer, x.dtype
        name = None if args or kwargs or not _plain(base) else _alone(layer, dtype)
        if name is None:
            result: Tensor = plain.forward(x, *args, **kwargs)
            return result
        for part in (layer.lora_A[name], layer.lora_B[name]):
            part._tempo.computed(x.numel() // max(1, x.shape[-1]), part.weight)
        if base._tempo.stays(x, base.weight):
            return _here(base, x, _adapter(layer, dtype))
        y: Tensor = base._tempo.linear(
            x,
            lambda: base.operands()._replace(adapter=_adapter(layer, dtype)),
            lambda: _here(base, x, _adapter(layer, dtype)),
        )
        return y


def _here(base: Any, x: Tensor, adapter: Adapter | None) -> Tensor:
    """All of it computed here."""
    weight, bias, _ = base.operands()
    y = F.linear(x, weight, bias)
    if adapter is None:
        return y
    low, b = F.linear(x.to(adapter.a.dtype), adapter.a), adapter.b * adapter.scale
    if native_for(y, low, b) is not None:
        added: Tensor = _Added.apply(y, low, b)
        return added
    flat = y.flatten(0, -2).to(b.dtype)
    return torch.addmm(flat, low.flatten(0, -2), b.t()).to(y.dtype).view(y.shape)


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


def _plain(module: nn.Module) -> bool:
    """Whether all that a call of ``module`` does is a product that Tempo computes."""
    original = getattr(type(module), "_tempo_original", None)
    known = original is nn.Linear or getattr(original, "__module__", "") == "transformers.pytorch_utils"
    return known and not hooked(module) and "forward" not in vars(module)


def _alone(layer: Any, dtype: torch.dtype) -> str | None:
    """The one adapter that is to be added to an output of inputs of ``dtype``, if it is a plain one."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or torch.is_autocast_enabled("cpu"):
        return None
    (name,) = active
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    drops = dropout.training and not isinstance(dropout, nn.Identity)
    if drops or not (_plain(a) and _plain(b)) or a.bias is not None or b.bias is not None or name in layer.lora_variant:
        return None
    alike = layer.base_layer.weight.dtype == dtype and a.weight.dtype == b.weight.dtype
    return str(name) if alike and a.weight.dtype in (dtype, adapter_dtype(dtype)) else None


def _adapter(layer: Any, dtype: torch.dtype) -> Adapter | None:
    """What `_alone` names."""
    name = _alone(layer, dtype)
    return None if name is None else Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])

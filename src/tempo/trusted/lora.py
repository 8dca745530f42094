"""PEFT's LoRA in fewer passes: ``base(x) + s (x Aᵀ) Bᵀ`` as one product that is added to the base's output.

PEFT takes three passes over an output for the product, its scale and the sum, and as many over its gradient. Where more
is asked (several adapters, variants such as DoRA, dropout, other dtypes, hooks), PEFT's own code runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tempo.layers.base import Protected
from tempo.trusted.kernels import hooked


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
        b = layer.lora_B[adapter].weight * layer.scaling[adapter]
        return torch.addmm(base.flatten(0, -2), low.flatten(0, -2), b.t()).view(base.shape)


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

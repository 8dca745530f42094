"""Adapters of PEFT (LoRA and relatives): the private change to a base that may be public. They stay trusted.

So do they when they do not train, in `generate` say, or as one of several: a frozen adapter is no less private than one
that learns. PEFT is recognised by what its layers tell of themselves, without importing it.
"""

from __future__ import annotations

from typing import Final

from torch import nn

_BASES: Final = ("base_layer", "original_module")
"""What PEFT calls the module that it wraps; all else that its wrappers hold belongs to adapters."""


def private_layers(model: nn.Module) -> dict[str, str]:
    """Why modules that belong to adapters stay trusted, by name; and those that have an adapter merged into them.

    Args:
        model: Any model; without adapters there are none.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not hasattr(type(module), "adapter_layer_names"):
            continue
        merged = bool(getattr(module, "merged_adapters", ()))
        for child, inside in module.named_children():
            if child in _BASES and not merged:
                continue
            reason = "an adapter is merged into it" if child in _BASES else "part of an adapter: the private change"
            found |= {".".join(filter(None, (name, child, rest))): reason for rest, _ in inside.named_modules()}
    return found

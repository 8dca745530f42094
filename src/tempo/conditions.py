"""What makes a scheme's known breaks apply, as far as a model shows it."""

from __future__ import annotations

from typing import Final

from torch import nn

from tempo.initial import Origin

_KEEP_SIGNS: Final = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
)
"""Activations whose output shows the zero or sign pattern of their input."""

_NAMES: Final = ("relu", "gelu", "silu", "swish", "mish", "elu")
"""The same, in the names that Hugging Face's configurations give activations."""


def conditions(model: nn.Module, origin: Origin) -> set[str]:
    """The keys of `Traits.known_breaks` that apply to ``model``; of functional calls nothing is seen.

    Not among them is ``spatial-convolution``: which convolutions go out as they are shows when they are called.
    """
    found = {"always"}
    if origin.known_public:
        found.add("public-base")
    if any(isinstance(module, _KEEP_SIGNS) for module in model.modules()) or any(
        name in activation for activation in _configured(model) for name in _NAMES
    ):
        found.add("relu")
    return found


def _configured(model: nn.Module) -> list[str]:
    """Activations named in the configurations of Hugging Face models in ``model``."""
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    fields = ("hidden_act", "hidden_activation", "activation_function", "activation")
    values = (getattr(config, field, None) for config in configs.values() for field in fields)
    return [value for value in values if isinstance(value, str)]

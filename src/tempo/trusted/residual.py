"""Layers of residual networks in which BatchNorm takes what follows on itself: ReLU, and the sum before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tempo.layers.base import Protected
from tempo.trusted.batch_norm import norm_relu, takes_relu
from tempo.trusted.kernels import hooked, native_for


class ConvNormAct(Protected):
    """Mixin for ResNetConvLayer of ``transformers`` and the classes like it."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        """As theirs."""
        plain: Any = super()
        layer: Any = self
        if native_for(hidden_state) is None or not takes_relu(layer.normalization, layer.activation):
            y: Tensor = plain.forward(hidden_state)
        else:
            y = norm_relu(layer.normalization, layer.convolution(hidden_state))
        return y

    @staticmethod
    def written(self: Any, hidden_state: Any) -> Any:  # noqa: D102 - theirs
        hidden_state = self.convolution(hidden_state)
        hidden_state = self.normalization(hidden_state)
        hidden_state = self.activation(hidden_state)
        return hidden_state


class Residual(Protected):
    """Mixin for ResNetBottleNeckLayer and ResNetBasicLayer of ``transformers`` and the classes like them."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        """As theirs."""
        plain: Any = super()
        layer: Any = self
        if native_for(hidden_state) is None or not _ends_in_norm(layer):
            y: Tensor = plain.forward(hidden_state)
        else:
            *first, last = layer.layer
            x = hidden_state
            for module in first:
                x = module(x)
            y = norm_relu(last.normalization, last.convolution(x), layer.shortcut(hidden_state))
        return y

    @staticmethod
    def written(self: Any, hidden_state: Any) -> Any:  # noqa: D102 - theirs
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        hidden_state = self.activation(hidden_state)
        return hidden_state


def _ends_in_norm(layer: Any) -> bool:
    """Whether nothing but the sum is between the last BatchNorm and ReLU."""
    inner = layer.layer
    if type(inner) is not nn.Sequential or not len(inner) or hooked(inner):
        return False
    last: Any = inner[-1]
    if not issubclass(type(last), ConvNormAct) or hooked(last):
        return False
    norm, activation = (getattr(last, name) for name in ("normalization", "activation"))
    return type(activation) is nn.Identity and takes_relu(norm, layer.activation, activation)

"""Protected layer types: one small file and one registry line for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from torch import nn

from tempo.engine.site import Site
from tempo.layers.attention import (
    Projections,
    ProtectedMultiheadAttention,
    ProtectedTransformerEncoder,
    ProtectedTransformerEncoderLayer,
)
from tempo.layers.base import Protected
from tempo.layers.conv import ProtectedConv1d, ProtectedConv2d, ProtectedConv3d
from tempo.layers.linear import ProtectedLinear


@dataclass(frozen=True, slots=True)
class LayerType:
    """How one module type is protected."""

    base: type[nn.Module]
    protected: type[Protected]
    methods: tuple[str, ...] = ("forward",)
    """What a subclass may override only if it passes the product on."""
    make_site: Callable[[Site], Site] = lambda site: site
    transposed: bool = False
    """Whether weights have input features first."""
    computes: bool = True
    """Whether it has products of its own, or only sees to it that its children's are not bypassed."""


REGISTRY: list[LayerType] = [
    LayerType(nn.Linear, ProtectedLinear),
    LayerType(nn.Conv1d, ProtectedConv1d, ("forward", "_conv_forward")),
    LayerType(nn.Conv2d, ProtectedConv2d, ("forward", "_conv_forward")),
    LayerType(nn.Conv3d, ProtectedConv3d, ("forward", "_conv_forward")),
    LayerType(nn.MultiheadAttention, ProtectedMultiheadAttention, make_site=Projections),
    LayerType(nn.TransformerEncoderLayer, ProtectedTransformerEncoderLayer, computes=False),
    LayerType(nn.TransformerEncoder, ProtectedTransformerEncoder, computes=False),
]

if find_spec("transformers") is not None:
    _hf = import_module("tempo.layers.hf_conv1d")
    REGISTRY.append(LayerType(_hf.Conv1D, _hf.ProtectedHFConv1D, transposed=True))


def layer_type(module: nn.Module) -> LayerType | None:
    """The registry's line for ``module``, or None."""
    return next((entry for entry in REGISTRY if isinstance(module, entry.base)), None)

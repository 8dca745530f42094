"""Which layers see more than others: the raw inputs, or the labels. By default they stay trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

RAW_CHANNELS: Final = 4
"""A convolution on at most this many channels sees raw pixels or samples."""

_BEFORE_LINEAR: Final = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, *CONVOLUTIONS)
"""A linear layer after one of these does not see the inputs as they come."""


@dataclass(frozen=True, slots=True)
class Exposed:
    """A layer that sees more than others."""

    reason: str
    """Why it stays trusted."""
    risk: str
    """What workers get to see where it goes out all the same."""
    last: bool = False


def exposed_layers(model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> dict[str, Exposed]:
    """The exposed ones among ``layers`` of ``model``, by name.

    First and last are so in the order of the model's modules, which need not be the order in which they run; a Hugging
    Face model tells its output layer.

    Args:
        model: The model.
        layers: Names and modules of the layers that could go out, in order.
    """
    found: dict[str, Exposed] = {}
    if (last := _last(model, layers)) is not None:
        found[last] = Exposed(
            "last layer: the gradient of its output shows labels",
            "is the last one; the gradient of its output shows which rows share a label, if a mask is undone",
            last=True,
        )
    if (first := _first_linear(model, layers)) is not None:
        found[first] = Exposed(
            "first layer: it sees the inputs as they come", "is the first one, so workers get masked raw inputs"
        )
    convolutions = [(name, module) for name, module in layers if isinstance(module, CONVOLUTIONS)]
    for number, (name, module) in enumerate(convolutions):
        if number == 0 or module.in_channels <= RAW_CHANNELS:
            found[name] = Exposed(
                "first convolution: few FLOPs on the rawest pixels",
                "is a convolution on near-raw input; masks leave its spatial axes as they are, so workers get to see "
                "mixed pictures",
            )
    return found


def _first_linear(model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> str | None:
    """The first linear or attention layer, if nothing comes before it."""
    names = {module: name for name, module in layers}
    for module in model.modules():
        if isinstance(module, _BEFORE_LINEAR):
            return None
        if module in names:
            return names[module]
    return None


def _last(model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> str | None:
    for module in model.modules():
        tell = getattr(module, "get_output_embeddings", None)
        output = tell() if callable(tell) else None
        inside = set() if output is None else set(output.modules())  # an adapter may be wrapped around it
        for name, layer in layers:
            if layer in inside:
                return name
    return layers[-1][0] if layers else None

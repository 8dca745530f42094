"""Protects a model in place, and takes it back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from tempo.engine.engine import Engine
from tempo.engine.site import Site
from tempo.errors import ProtectionWarning, SettingsError
from tempo.layers import layer_type
from tempo.layers.base import Protected, overrides, protected_class

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

RAW_CHANNELS = 4
"""A convolution on at most this many channels sees raw pixels or samples."""


@dataclass(frozen=True, slots=True)
class ProtectedLayer:
    """One line of a session's report."""

    name: str
    module: nn.Module
    site: Site | None
    """None for a module of no supported type that holds matrices of its own."""


def protect(model: nn.Module, engine: Engine, trusted: Sequence[str]) -> list[ProtectedLayer]:
    """Swap the class of every supported layer of ``model``.

    Args:
        model: Any module; changed in place.
        engine: Where products go.
        trusted: Shell patterns of module names that stay in the trusted process.

    Returns:
        The layers found, whether they go out or not, then the unsupported ones.

    Raises:
        SettingsError: The model is protected already, or a pattern covers no layer.
    """
    if any(isinstance(module, Protected) for module in model.modules()):
        raise SettingsError("this model is protected already; call unprotect() of its session first")
    supported = [(name, module, entry) for name, module in model.named_modules() if (entry := layer_type(module))]
    inside = _inside_attention(model)
    _check_patterns(trusted, [name for name, _, entry in supported if entry.computes and name not in inside], inside)
    found = []
    convolutions_seen = 0
    for name, module, entry in supported:
        if name in inside:
            continue
        reason = _reason_to_keep(name, module, trusted)
        if isinstance(module, _CONVOLUTIONS):
            convolutions_seen += 1
            if reason is None and (convolutions_seen == 1 or module.in_channels <= RAW_CHANNELS):
                if engine.settings.placement == "auto":
                    reason = "first convolution: few FLOPs on the rawest pixels"
                else:
                    engine.warn_once(
                        f"layer {name!r} is a convolution on near-raw input; masks leave its spatial axes as they are, "
                        f"so workers get to see mixed pictures (trusted={name!r} keeps it here)",
                        ProtectionWarning,
                    )
        lazy = any(is_lazy(p) for p in module.parameters(recurse=False))
        if lazy:
            reason = "its parameters are lazy: run one batch, then protect"
        bypass = overrides(module, entry.base, entry.methods)
        if bypass is not None:
            reason = f"{bypass} overrides what Tempo would replace"
            warnings.warn(f"layer {name!r} stays trusted: {reason}", stacklevel=3)
        site = entry.make_site(Site(engine, name or type(module).__name__, engine.scheme, reason))
        if bypass is None and not lazy:
            # Not through __setattr__: a module would look for a parameter or submodule of that name.
            module.__dict__["_tempo"] = site
            module.__class__ = protected_class(type(module), entry.protected)
        if entry.computes:
            found.append(ProtectedLayer(site.name, module, site))
    others = [(name, module) for name, module in model.named_modules() if layer_type(module) is None]
    return found + [ProtectedLayer(name, module, None) for name, module in others if _multiplies(module)]


def unprotect(model: nn.Module) -> None:
    """Give every protected layer of ``model`` its own class back.

    Raises:
        SettingsError: A layer's class was changed again after `protect`, by a parametrization say.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Protected)]
    for name, module in layers:
        if "_tempo_original" not in vars(type(module)):
            raise SettingsError(
                f"layer {name!r} was given the class {type(module).__name__} after protect(); undo that first "
                "(torch.nn.utils.parametrize.remove_parametrizations, say)"
            )
    for _, module in layers:
        del module.__dict__["_tempo"]
        module.__class__ = module._tempo_original  # type: ignore[assignment]


def _multiplies(module: nn.Module) -> bool:
    """Whether a module of no supported type seems to have products of its own: it holds a matrix, not a table."""
    tables = (nn.Embedding, nn.EmbeddingBag)
    return not isinstance(module, tables) and any(
        not is_lazy(p) and p.dim() >= 2 and min(p.shape) > 1 for p in module.parameters(recurse=False)
    )


def _inside_attention(model: nn.Module) -> set[str]:
    """Names of the output projections that attention layers read by themselves: they go where the attention goes."""
    attentions = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    return {f"{name}.out_proj".removeprefix(".") for name, _ in attentions}


def _check_patterns(trusted: Sequence[str], layers: Sequence[str], inside_attention: set[str]) -> None:
    """Refuse a pattern that would keep nothing: a typo must not send a layer out."""
    for pattern in trusted:
        split = next((name for name in inside_attention if fnmatchcase(name, pattern)), None)
        if split is not None and not _covers(pattern, split.rpartition(".")[0]):
            raise SettingsError(
                f"trusted={pattern!r} names {split!r}, which goes where its attention layer goes: name that one"
            )
        if not any(_covers(pattern, layer) for layer in layers):
            raise SettingsError(f"trusted={pattern!r} covers none of the layers that would go out")


def _covers(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names the module ``name`` or one that contains it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _reason_to_keep(name: str, module: nn.Module, trusted: Sequence[str]) -> str | None:
    """Why a layer never goes out, or None."""
    pattern = next((p for p in trusted if _covers(p, name)), None)
    if pattern is not None:
        return f"kept by trusted={pattern!r}"
    if (
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and module.groups > 1
        and module.groups == module.in_channels
    ):
        return "depthwise: too few FLOPs for its bytes"
    return None

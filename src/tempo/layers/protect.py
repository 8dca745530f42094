"""Protects a model in place, and takes it back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from tempo.engine.engine import Engine
from tempo.engine.site import Site
from tempo.errors import SettingsError
from tempo.layers import layer_type
from tempo.layers.base import Protected, overrides, protected_class

RAW_CHANNELS = 4
"""A convolution on at most this many channels sees raw pixels or samples."""


@dataclass(frozen=True, slots=True)
class ProtectedLayer:
    """One line of a session's report."""

    name: str
    module: nn.Module
    site: Site


def protect(model: nn.Module, engine: Engine, trusted: Sequence[str]) -> list[ProtectedLayer]:
    """Swap the class of every supported layer of ``model``.

    Args:
        model: Any module; changed in place.
        engine: Where products go.
        trusted: Shell patterns of module names that stay in the trusted process.

    Returns:
        The layers found, whether they go out or not.

    Raises:
        SettingsError: The model is protected already, or a pattern matches no module.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in trusted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SettingsError(f"trusted={pattern!r} matches no module of this {type(model).__name__}")
    if any(isinstance(module, Protected) for module in model.modules()):
        raise SettingsError("this model is protected already; call unprotect() of its session first")
    found = []
    keep_first_convolution = engine.settings.placement == "auto"
    for name, module in _own_products(model):
        entry = layer_type(module)
        if entry is None:
            continue
        reason = _reason_to_keep(name, module, trusted)
        if reason is None and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and keep_first_convolution:
            keep_first_convolution = False
            reason = "first convolution: few FLOPs on the rawest pixels"
        bypass = overrides(module, entry.base, entry.methods)
        if bypass is not None:
            reason = f"{bypass} overrides what Tempo would replace"
            warnings.warn(f"layer {name!r} stays trusted: {reason}", stacklevel=3)
        site = entry.make_site(Site(engine, name, reason))
        if bypass is None:
            # Not through __setattr__: a module would look for a parameter or submodule of that name.
            module.__dict__["_tempo"] = site
            module.__class__ = protected_class(type(module), entry.protected)
        if entry.computes:
            found.append(ProtectedLayer(name, module, site))
    return found


def unprotect(model: nn.Module) -> None:
    """Give every protected layer of ``model`` its own class back."""
    for module in model.modules():
        if isinstance(module, Protected):
            del module.__dict__["_tempo"]
            module.__class__ = module._tempo_original  # type: ignore[assignment]


def _own_products(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, without the output projections that attention layers read by themselves."""
    inner = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return ((name, module) for name, module in model.named_modules() if id(module) not in inner)


def _reason_to_keep(name: str, module: nn.Module, trusted: Sequence[str]) -> str | None:
    """Why a layer never goes out, or None."""
    pattern = next((p for p in trusted if fnmatchcase(name, p)), None)
    if pattern is not None:
        return f"kept by trusted={pattern!r}"
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        return "lazy: run one batch before protecting"
    if (
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and module.groups > 1
        and module.groups == module.in_channels
    ):
        return "depthwise: too few FLOPs for its bytes"
    return None

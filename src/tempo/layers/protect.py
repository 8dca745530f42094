"""Protects a model in place, and takes it back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tempo.engine.engine import Engine
from tempo.engine.site import Site
from tempo.errors import ProtectionWarning, SettingsError
from tempo.layers import LayerType, layer_type
from tempo.layers.adapters import private_layers
from tempo.layers.base import Protected, overrides, protected_class
from tempo.layers.exposed import CONVOLUTIONS, exposed_layers
from tempo.layers.memory_format import unaware
from tempo.schemes.base import Scheme
from tempo.trusted.mode import OWN, Root, root_class
from tempo.trusted.modules import replace_modules
from tempo.trusted.small_calls import SmallCalls
from tempo.wire.messages import Conv, Linear

log = logging.getLogger("tempo")

_LARGE_SHARE = 0.1
"""A last layer of this share of the parameters or more is worth a word about what it costs to keep."""


@dataclass(frozen=True, slots=True)
class ProtectedLayer:
    """One line of a session's report."""

    name: str
    module: nn.Module
    site: Site | None
    """None for a module of no supported type that holds matrices of its own."""


def protect(
    model: nn.Module,
    engine: Engine,
    scheme: Scheme,
    trusted: Sequence[str],
    offload: Sequence[str],
    *,
    declared: bool = False,
) -> list[ProtectedLayer]:
    """Swap the class of every supported layer of ``model``.

    Args:
        model: Any module; changed in place.
        engine: Where products go.
        scheme: What masks them.
        trusted: Shell patterns of module names that stay in the trusted process.
        offload: The same of layers that may go out although they are `exposed_layers`.
        declared: Whether the user said that frozen weights are public. If not, those go out that all workers have
            already, where the scheme does not hide weights.

    Returns:
        The layers found, whether they go out or not, then the unsupported ones.

    Raises:
        SettingsError: The model is protected already, a pattern covers no layer, or no weight may go out.
    """
    if any(isinstance(module, Protected) for module in model.modules()):
        raise SettingsError("this model is protected already; call unprotect() of its session first")
    inside = _inside_attention(model)
    supported = [
        (name, module, entry)
        for name, module in model.named_modules()
        if (entry := layer_type(module)) and name not in inside
    ]
    layers = [(name, module) for name, module, entry in supported if entry.computes]
    for setting, patterns in (("trusted", trusted), ("offload", offload)):
        _check_patterns(setting, patterns, [name for name, _ in layers], inside)
    kept = _reasons_to_keep(model, layers, engine, scheme, trusted, offload)
    if scheme.traits.public_weights:
        weights = [w for name, module, entry in supported if name not in kept for w in _frozen(module, entry)]
        if declared:
            for weight in weights:
                engine.public.add(weight)
        else:
            _seek(engine, scheme, weights)
    channels_last = engine.settings.memory_format == "auto" and unaware(model)
    found = []
    for name, module, entry in supported:
        reason = kept.get(name)
        lazy = any(is_lazy(p) for p in module.parameters(recurse=False))
        if lazy:
            reason = "its parameters are lazy: run one batch, then protect"
        bypass = overrides(module, entry.base, entry.methods)
        if bypass is not None:
            reason = f"{bypass} overrides what Tempo would replace"
            warnings.warn(f"layer {name!r} stays trusted: {reason}", stacklevel=3)
        site = entry.make_site(Site(engine, name or type(module).__name__, scheme, reason, channels_last))
        if bypass is None and not lazy:
            # Not through __setattr__: a module would look for a parameter or submodule of that name.
            module.__dict__["_tempo"] = site
            module.__class__ = protected_class(type(module), entry.protected)
        if entry.computes:
            found.append(ProtectedLayer(site.name, module, site))
    if any(isinstance(module, Protected) for module in model.modules()):
        replace_modules(model)
        model.__class__ = root_class(type(model))
        model.__dict__.update(_tempo_small=SmallCalls(list(model.modules())), _tempo_channels_last=channels_last)
    others = [(name, module) for name, module in model.named_modules() if layer_type(module) is None]
    return found + [ProtectedLayer(name, module, None) for name, module in others if _multiplies(module)]


def unprotect(model: nn.Module) -> None:
    """Give every protected layer of ``model`` its own class back.

    Raises:
        SettingsError: A layer's class was changed again after `protect`, by a parametrization say.
    """
    swapped = [(name, module) for name, module in model.named_modules() if isinstance(module, Protected | Root)]
    for name, module in swapped:
        if not {"_tempo_original", "_tempo_root"} & vars(type(module)).keys():
            raise SettingsError(
                f"layer {name!r} was given the class {type(module).__name__} after protect(); undo that first "
                "(torch.nn.utils.parametrize.remove_parametrizations, say)"
            )
    for _, module in swapped:
        if isinstance(module, Root):
            for name in OWN:
                del module.__dict__[name]
            module.__class__ = module._tempo_root  # type: ignore[assignment]
        if isinstance(module, Protected):
            module.__dict__.pop("_tempo", None)
            module.__class__ = module._tempo_original  # type: ignore[assignment]


def _frozen(module: nn.Module, entry: LayerType) -> list[Tensor]:
    """The frozen weights of a layer as they are multiplied, output features first."""
    attention = isinstance(module, nn.MultiheadAttention)
    weights: list[Tensor] = []
    for parameter in module.parameters(recurse=attention):
        if is_lazy(parameter) or parameter.dim() < 2 or parameter.requires_grad:
            continue
        w = parameter.detach().flatten(1)
        weights.append(w.t() if entry.transposed else w)
        if attention and parameter is module.in_proj_weight:
            # Self-attention reads one projection at a time, attention to something else keys and values together.
            weights += (*w.chunk(3), w[len(w) // 3 :])
    return weights


def _seek(engine: Engine, scheme: Scheme, weights: Sequence[Tensor]) -> None:
    """Ask workers which weights they have; what some lack is not sent, since nobody said that it may be."""
    found = engine.known([scheme.public_digest(weight) for weight in weights])
    for weight, known in zip(weights, found, strict=True):
        engine.public.sought(weight, known)
    if weights and not any(found):
        raise SettingsError(
            f"protect(): scheme {scheme.name!r} sends frozen weights as they are, and there is none here that every "
            "worker has in a --base of its own: say base='public' if everyone may have them, or choose a scheme that "
            "hides weights ('mix')"
        )
    log.log(
        logging.INFO if all(found) else logging.WARNING,
        "scheme %r: every worker has %d of %d frozen weights in its --base; the others stay here (base='public' sends "
        "them)",
        scheme.name,
        sum(found),
        len(found),
    )


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


def _check_patterns(setting: str, patterns: Sequence[str], layers: Sequence[str], inside_attention: set[str]) -> None:
    """Refuse a pattern that covers nothing: a typo must not send a layer out."""
    for pattern in patterns:
        split = next((name for name in inside_attention if fnmatchcase(name, pattern)), None)
        if split is not None and not _covers(pattern, split.rpartition(".")[0]):
            raise SettingsError(
                f"{setting}={pattern!r} names {split!r}, which goes where its attention layer goes: name that one"
            )
        if not any(_covers(pattern, layer) for layer in layers):
            raise SettingsError(f"{setting}={pattern!r} covers none of the layers that could go out")


def _covers(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names the module ``name`` or one that contains it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _reasons_to_keep(
    model: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    engine: Engine,
    scheme: Scheme,
    trusted: Sequence[str],
    offload: Sequence[str],
) -> dict[str, str]:
    """Why layers never go out, by name; warns of exposed ones that do, and of what keeping them costs."""
    private = private_layers(model)
    layers = [(name, module) for name, module in layers if name not in private]
    kept = {name: reason for name, module in layers if (reason := _own_reason(name, module, trusted))}
    chosen = len(kept) == len(layers)
    refused = {name for name, module in layers if _refused(scheme, module)}
    careful = engine.settings.placement == "auto"
    by_exposure = []
    exposed = {} if scheme.traits.exact else exposed_layers(model, layers)
    for name, found in exposed.items():
        if name in kept or any(_covers(pattern, name) for pattern in offload):
            continue
        if careful:
            kept[name] = found.reason
            by_exposure.append(name)
        elif name not in refused:
            engine.warn_once(f"layer {name!r} {found.risk} (trusted={name!r} keeps it here)", ProtectionWarning)
    if not chosen and kept.keys() | refused >= {name for name, _ in layers}:
        _warn_that_nothing_goes_out(engine, scheme, by_exposure, refused)
    elif by_exposure:
        _warn_of_cost(engine, layers, [name for name in by_exposure if exposed[name].last])
    return kept | private


def _warn_that_nothing_goes_out(engine: Engine, scheme: Scheme, exposed: Sequence[str], refused: Set[str]) -> None:
    """Say that all layers stay home, and why, where that is not what was asked for."""
    reasons = []
    if sent := [name or "*" for name in exposed if name not in refused]:
        names = ", ".join(map(repr, sent))
        reasons.append(f"layers near inputs and labels stay trusted (offload=({names},) sends them all the same)")
    if refused:
        reasons.append(f"layers of fewer features than scheme {scheme.name!r} needs stay trusted")
    engine.warn_once(f"nothing of this model goes out: {'; '.join(reasons)}", ProtectionWarning)


def _warn_of_cost(engine: Engine, layers: Sequence[tuple[str, nn.Module]], last: Sequence[str]) -> None:
    """Say what a large last layer costs that stays."""
    sizes = {name: sum(p.numel() for p in module.parameters() if not is_lazy(p)) for name, module in layers}
    for name in last:
        share = sizes[name] / max(1, sum(sizes.values()))
        if share >= _LARGE_SHARE:
            engine.warn_once(
                f"the last layer {name!r} stays trusted, since the gradient of its output shows labels: {share:.0%} of "
                "the parameters that workers could compute with, and of fully connected layers that share of the FLOPs "
                f"(offload=({name!r},) sends it all the same)",
                ProtectionWarning,
            )


def _own_reason(name: str, module: nn.Module, trusted: Sequence[str]) -> str | None:
    """Why a layer never goes out, whatever is around it, or None."""
    pattern = next((p for p in trusted if _covers(p, name)), None)
    if pattern is not None:
        return f"kept by trusted={pattern!r}"
    if isinstance(module, CONVOLUTIONS) and module.groups > 1 and module.groups == module.in_channels:
        return "depthwise: too few FLOPs for its bytes"
    return None


def _refused(scheme: Scheme, module: nn.Module) -> bool:
    """Whether ``scheme`` will keep this layer, however many rows it is given."""
    weight = getattr(module, "weight", None)
    if weight is None or is_lazy(weight):
        return False
    shape = tuple(weight.shape)
    rows = 1 << 20
    if isinstance(module, nn.Linear):
        return scheme.refuses(Linear(), (rows, shape[1]), shape) is not None
    if isinstance(module, CONVOLUTIONS):
        if scheme.traits.unfolds and module.groups == 1:
            return scheme.refuses(Linear(), (rows, prod(shape[1:])), (shape[0], prod(shape[1:]))) is not None
        ones = (1,) * (len(shape) - 2)
        kind = Conv(ones, (0,) * len(ones), ones, module.groups)
        return scheme.refuses(kind, (rows, module.in_channels, *shape[2:]), shape) is not None
    return False

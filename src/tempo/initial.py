"""Where a model's initial weights come from, and initial weights that nobody can repeat.

A masked model protects its weights only from workers that do not know nearly the same weights already. A public
checkpoint is such a *public base*, and so are random weights from a seed: who knows code and seed draws them again
(and torch's CPU generator uses 32 bits of a seed, which can be tried one by one). So a base counts as secret only where
Tempo made it so itself, or where the user says so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tempo.errors import SettingsError
from tempo.keys import KeySchedule
from tempo.layers import layer_type

M = TypeVar("M", bound=nn.Module)
Base = Literal["public", "secret"]

_MADE_SECRET: Final[set[bytes]] = set()
"""Digests of the matrices that `secret_initialisation` left behind, so that copies of a model are recognised too."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What the weights of a model count as, and why."""

    base: Base
    why: str
    known_public: bool = False
    """Whether they are known to be public, not merely not known to be secret."""


def secret_initialisation(model: M) -> M:
    """Make the random initial weights of ``model`` secret: shuffle the entries of each matrix.

    Every parameter of two or more dimensions gets its entries in an order from the operating system's CSPRNG (HKDF and
    AES-CTR, `tempo.keys`). That keeps the distribution of any initialiser that draws entries independently: uniform,
    normal, truncated, Xavier, Kaiming. Zeros stay where they are (padding rows, sparse initialisers); so do vectors and
    constants, and parameters that require no gradient, which are fixed tables. An initialiser whose entries depend on
    each other, `nn.init.orthogonal_` say, does not survive.

    Who knows the seed still knows which numbers a matrix holds, only not where: the entries as a multiset.

    Call it after building the model and before training it; `Session.protect` then recognises the weights, and those
    of copies in this process, as secret, until they change. (Ranks of DDP take over those of rank 0: say
    ``base="secret"`` there.)

    Args:
        model: A model with random initial weights; changed in place.

    Returns:
        ``model`` itself.

    Raises:
        SettingsError: Its weights were loaded from a checkpoint, which this would destroy, or do not exist yet.
    """
    if checkpoint := _checkpoint(model):
        raise SettingsError(
            f"secret_initialisation(): the weights of {type(model).__name__} come from {checkpoint!r}, and shuffling "
            "would destroy them; if only the configuration does, set its _name_or_path to '' first"
        )
    if name := next((name for name, p in model.named_parameters() if is_lazy(p)), None):
        raise SettingsError(f"secret_initialisation(): {name!r} is lazy: run one batch first")
    keys = KeySchedule()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() < 2 or not parameter.requires_grad:
                continue
            flat = parameter.reshape(-1)  # a copy, where the memory is not contiguous
            places = flat.nonzero().squeeze(1)
            values = flat[places]
            if len(values) == 0 or bool((values == values[0]).all()):
                continue  # nothing to shuffle, and nothing secret
            order = keys.fresh(number, "shuffle").stream("order").permutation(len(values))
            shuffled = flat.index_put((places,), values[torch.from_numpy(order).to(places.device)])
            parameter.copy_(shuffled.view_as(parameter))
            _MADE_SECRET.add(_digest(parameter))
    return model


def origin(model: nn.Module, base: Literal["auto", "public", "secret"] = "auto") -> Origin:
    """What the weights of ``model`` count as.

    Args:
        model: Any model.
        base: What the user says; with ``auto``, what Tempo knows: public, unless it made every matrix secret itself.
    """
    checkpoint = _checkpoint(model)
    if base != "auto":
        return Origin(base, f"base={base!r} was given", known_public=base == "public" or bool(checkpoint))
    if checkpoint:
        return Origin("public", f"its weights come from {checkpoint!r}", known_public=True)
    if _MADE_SECRET and all(_is_secret(parameter) for parameter in _matrices(model)):
        return Origin("secret", "tempo.secret_initialisation drew its weights")
    return Origin(
        "public",
        "nothing is known of where its weights come from, so they count as public; if they were trained from secret "
        "ones say base='secret', and tempo.secret_initialisation(model) makes random ones secret",
    )


def _checkpoint(model: nn.Module) -> str:
    """The checkpoint that a Hugging Face model in ``model`` was loaded from; of others nothing is known."""
    names = (getattr(getattr(module, "config", None), "_name_or_path", "") for module in model.modules())
    return next((name for name in names if isinstance(name, str) and name), "")


def _matrices(model: nn.Module) -> list[Tensor]:
    """Parameters of two or more dimensions in the layers that can go out."""
    layers = (module for module in model.modules() if layer_type(module) is not None)
    return list({id(p): p for layer in layers for p in layer.parameters() if is_lazy(p) or p.dim() > 1}.values())


def _is_secret(parameter: Tensor) -> bool:
    if is_lazy(parameter):
        return False
    constant = parameter.numel() == 0 or bool((parameter == parameter.reshape(-1)[0]).all())
    return constant or _digest(parameter) in _MADE_SECRET


def _digest(parameter: Tensor) -> bytes:
    values = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).digest()

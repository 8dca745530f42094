"""Modules of other libraries that a protected model computes in fewer passes: one line here for each."""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional as F

from tempo.layers.base import Protected, protected_class
from tempo.trusted.gated import GatedMlp
from tempo.trusted.lora import FusedLora
from tempo.trusted.residual import ConvNormAct, Residual
from tempo.trusted.rms_norm import RmsNorm
from tempo.trusted.rotary import NAME, apply_rotary_pos_emb, rotate_half, rotated


class TanhGelu(Protected):
    """Mixin for ``transformers``' NewGELUActivation (GPT-2's): eight passes as it is written, one as PyTorch's."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that it has there
        """The same function of ``input``, element by element."""
        return F.gelu(input, approximate="tanh")


REPLACED: Final[dict[tuple[str, str], type[Protected]]] = {
    ("peft.tuners.lora.layer", "Linear"): FusedLora,
    ("transformers.activations", "NewGELUActivation"): TanhGelu,
}
"""By the module's Python module, which is looked for where it was imported only, and class."""


_ALIKE: Final = (RmsNorm, GatedMlp, ConvNormAct, Residual)
"""For whatever class has the ``forward`` that each says is ``written``."""


def replace_modules(model: nn.Module) -> None:
    """Give modules of ``model`` their faster classes, but those whose ``forward`` is not the one that is known."""
    known = {
        getattr(sys.modules[name], cls).forward: mixin
        for (name, cls), mixin in REPLACED.items()
        if hasattr(sys.modules.get(name), cls)
    }
    for module in model.modules():
        forward = type(module).forward
        mixin = known.get(forward) or _alike(forward)
        if mixin is not None and "forward" not in vars(module):
            module.__class__ = protected_class(type(module), mixin, outermost=True)


def _alike(forward: Any) -> type[Protected] | None:
    """What computes the same as ``forward``: many models have a class of their own for one function."""
    if not isinstance(forward, FunctionType):
        return None
    names = forward.__globals__
    if NAME in forward.__code__.co_names and _same(names.get(NAME), apply_rotary_pos_emb):
        return rotated(forward) if _same(names[NAME].__globals__.get("rotate_half"), rotate_half) else None
    return next((mixin for mixin in _ALIKE if _same(forward, mixin.written)), None)


def _same(function: Any, known: Any) -> bool:
    """Whether two functions were written alike, names of locals, types and docstring apart."""
    if not isinstance(function, FunctionType) or function.__closure__ is not None:
        return False
    pair = []
    for f in (function, known):
        constants = [c for c in f.__code__.co_consts if c != f.__doc__]
        pair.append((f.__code__.co_code, f.__code__.co_names, constants, f.__defaults__))
    return pair[0] == pair[1]

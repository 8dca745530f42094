"""Modules of other libraries that a protected model computes in fewer passes: one line here for each."""

from __future__ import annotations

import sys
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional as F

from tempo.layers.base import Protected, protected_class
from tempo.trusted.lora import FusedLora


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


def replace_modules(model: nn.Module) -> None:
    """Give modules of `REPLACED` in ``model`` their faster classes, but those whose ``forward`` is not the original."""
    found: dict[Any, type[Protected]] = {
        getattr(sys.modules[name], cls).forward: mixin
        for (name, cls), mixin in REPLACED.items()
        if hasattr(sys.modules.get(name), cls)
    }
    for module in model.modules():
        mixin = found.get(type(module).forward)
        if mixin is not None and "forward" not in vars(module):
            module.__class__ = protected_class(type(module), mixin, outermost=True)

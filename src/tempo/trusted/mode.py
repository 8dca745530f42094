"""Puts native kernels in the place of PyTorch's functions while a protected model runs, whoever's code calls them."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from tempo import kernels
from tempo.layers.memory_format import restored
from tempo.trusted.activations import gelu, silu
from tempo.trusted.attention import attention
from tempo.trusted.batch_norm import batch_norm
from tempo.trusted.small_calls import SmallCalls

REPLACED: Final[dict[Any, Callable[..., Tensor | None]]] = {
    F.batch_norm: batch_norm,
    F.gelu: gelu,
    F.silu: silu,
    F.scaled_dot_product_attention: attention,
}


class TrustedMode(TorchFunctionMode):
    """Within it, functions of `REPLACED` are computed by native kernels where these can."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """``func``, or what replaces it."""
        replacement = REPLACED.get(func)
        result = None if replacement is None else replacement(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


OWN: Final = ("_tempo_small", "_tempo_channels_last")
"""Attributes of `Root`, which are no part of the model."""


class Root:
    """Mixin of the class that a protected model itself is given: calls run in `TrustedMode`, but small ones."""

    _tempo_root: type[nn.Module]
    _tempo_small: SmallCalls
    _tempo_channels_last: bool
    """Whether feature maps may leave it with channels last, and are put back."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        call = super().__call__  # type: ignore[misc]
        # Not where a compiler looks, nor inside another protected model.
        if torch.compiler.is_compiling() or isinstance(_get_current_function_mode(), TrustedMode):
            result = call(*args, **kwargs)
        else:
            small = self._tempo_small
            alike = small.alike(args, kwargs)
            if alike is not None and small.plain(alike):
                return small.run(alike, call, args, kwargs)
            with small.looked_at(alike), TrustedMode() if kernels.native() is not None else nullcontext():
                result = call(*args, **kwargs)
        return restored(result) if self._tempo_channels_last else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as the model that it was, in whatever way that one is."""
        twin = object.__new__(self._tempo_root)
        twin.__dict__ = {name: value for name, value in self.__dict__.items() if name not in OWN}
        reduced = twin.__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        make, args, *rest = reduced
        if make is copyreg.__newobj__ and len(args) == 1:  # type: ignore[attr-defined]
            # With it, pickle insists on the object's present class.
            make, args = copyreg._reconstructor, (*args, object, None)  # type: ignore[attr-defined]
        return make, args, *rest


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def root_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of a protected model: ``original`` by name, within `Root`."""
    if original not in _CLASSES:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        _CLASSES[original] = type(original.__name__, (Root, original), {**names, "_tempo_root": original})
    return _CLASSES[original]

"""What all protected layers have in common.

Protecting a module swaps its class for a subclass that computes its product through a `Site`, as PyTorch's own
parametrizations and FSDP do. So it stays the same object with the same parameters and names, an instance of its own
types; a subclass that pads or rescales around ``super().forward`` keeps doing so.
"""

from __future__ import annotations

import copyreg
from copy import deepcopy
from typing import Any

from torch import nn

from tempo.engine.site import Site


class Protected:
    """Mixin of every class of layers that Tempo computes. ``_tempo`` holds the site of those that may go out."""

    _tempo: Site
    _tempo_original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as the plain module: a stored model does not know of the session it ran under."""
        state = dict(self.__getstate__())  # type: ignore[call-overload] # raises where parametrizations forbid it
        state.pop("_tempo", None)
        # Not `copyreg.__newobj__`, with which pickle insists on the object's present class.
        return copyreg._reconstructor, (self._tempo_original, object, None), state  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A deep copy is protected too, under labels of its own."""
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update({name: deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copy


_CLASSES: dict[tuple[type[nn.Module], type[Protected]], type[nn.Module]] = {}


def protected_class(
    original: type[nn.Module], protected: type[Protected], *, outermost: bool = False
) -> type[nn.Module]:
    """The class of a protected module: ``original`` first, so that its own overrides wrap the protected product.

    With ``outermost``, ``protected`` comes first, and calls what it wraps itself.
    """
    key = (original, protected)
    if key not in _CLASSES:
        bases: tuple[type, ...] = (protected,) if original in protected.__mro__ else (original, protected)
        if outermost:
            bases = (protected, original)
        _CLASSES[key] = type(
            original.__name__,
            bases,
            {
                "__module__": original.__module__,
                "__qualname__": original.__qualname__,
                "__doc__": original.__doc__,
                "_tempo_original": original,
                "__reduce_ex__": Protected.__reduce_ex__,
                "__deepcopy__": Protected.__deepcopy__,
            },
        )
    return _CLASSES[key]


def overrides(module: nn.Module, base: type[nn.Module], methods: tuple[str, ...]) -> str | None:
    """Name of a method that a subclass overrides without passing the product on to ``base``, or None.

    An override is known to pass it on if it calls ``super()``'s method of that name, or another of ``methods``.
    """
    for method in methods:
        if method in vars(module):
            return f"a {method} set on the instance"
    for cls in type(module).__mro__:
        if cls is base:
            return None
        for method in methods:
            function = vars(cls).get(method)
            if function is None:
                continue
            names = set(getattr(getattr(function, "__code__", None), "co_names", ()))
            passes_on = ("super" in names and method in names) or any(m in names for m in methods if m != method)
            if not passes_on:
                return f"{cls.__name__}.{method}"
    return None

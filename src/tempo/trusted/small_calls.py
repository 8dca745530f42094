"""Runs small calls of a protected model, of which nothing goes out, as the plain model would.

What Tempo puts around a layer takes some microseconds, and so does a mode that looks at every function called: nothing
beside a large product, and half as much again as the whole step of a tiny model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from tempo.engine.site import SETTLING, Site, Usage
from tempo.layers.base import Protected

SMALL: Final = 1 << 25
"""FLOPs of a layer, on average, below which a call is small: a third of a millisecond of a core, beside which it shows
what Tempo puts around it."""

_AGAIN: Final = 64
"""Of so many calls, one runs protected and is looked at again: weights may have changed hands."""

_KINDS: Final = 64
"""How many kinds of calls are remembered."""

_set_class: Final = object.__setattr__  # that of `nn.Module` is slow


@final
class Alike:
    """Calls of one model that are alike.

    Attributes:
        stayed: How many in a row were small, and sent nothing for a reason that lasts.
        calls: How many there were.
        usages: What layers computed in the last that was looked at: FLOPs.
        trained: Of the layers' weights, whether they wanted gradients then.
    """

    def __init__(self) -> None:
        self.stayed = self.calls = self.flops = 0
        self.usages: list[tuple[Usage, int]] = []
        self.trained: list[bool] = []


@final
class SmallCalls:
    """Of one protected model.

    Args:
        modules: Its modules, protected ones and others.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._classes = [(m, type(m), m._tempo_original) for m in modules if isinstance(m, Protected)]
        self._sites: list[Site] = [vars(m)["_tempo"] for m in modules if "_tempo" in vars(m)]
        self._weights = [p for m, _, _ in self._classes for p in m.parameters(recurse=False) if p.dim() > 1]
        self._found: dict[tuple[object, ...], Alike] = {}

    def alike(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Alike | None:
        """Calls like this one; None: its products depend on more than the shapes of a few tensors."""
        key: list[object] = [torch.is_grad_enabled(), torch._C._is_any_autocast_enabled(), *kwargs]
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                try:
                    key += (value.shape, value.dtype, value.requires_grad)
                except RuntimeError:  # a nested one has no shape
                    return None
            elif value is None or isinstance(value, bool | int | str):
                key.append(value)
            else:
                return None
        likeness = tuple(key)
        found = self._found.get(likeness)
        if found is None:
            if len(self._found) == _KINDS:
                self._found.clear()
            found = self._found[likeness] = Alike()
        found.calls += 1
        return found

    def plain(self, alike: Alike) -> bool:
        """Whether the next of these calls may be computed by the plain model."""
        if alike.stayed <= SETTLING or not alike.calls % _AGAIN:
            return False
        return not self._sites[0].engine.residences and alike.trained == [w.requires_grad for w in self._weights]

    def run(self, alike: Alike, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """``call`` while layers have their own classes; accounts for what they compute."""
        for usage, flops in alike.usages:
            usage.trusted += flops
        self._sites[0].engine.stats.flops_trusted += alike.flops
        # What was given another class since, by a parametrization say, keeps it.
        swapped = [swap for swap in self._classes if type(swap[0]) is swap[1]]
        try:
            for module, _, original in swapped:
                _set_class(module, "__class__", original)
            return call(*args, **kwargs)
        finally:
            for module, ours, _ in swapped:
                _set_class(module, "__class__", ours)

    @contextmanager
    def looked_at(self, alike: Alike | None) -> Iterator[None]:
        """Within it, a call runs protected; note what layers do in it."""
        if alike is None or not self._sites:
            yield
            return
        before = self._used()
        yield
        lasting, usages = True, []
        for usage, now in self._used().items():
            offloaded, trusted, passing = (b - a for a, b in zip(before.get(usage, (0, 0, 0)), now, strict=True))
            lasting = lasting and not offloaded and not passing
            if trusted:
                usages.append((usage, trusted))
        flops, trained = sum(flops for _, flops in usages), [w.requires_grad for w in self._weights]
        again = lasting and flops < SMALL * len(usages) and trained == alike.trained
        alike.stayed = alike.stayed + 1 if again else 0
        alike.usages, alike.flops, alike.trained = usages, flops, trained

    def _used(self) -> dict[Usage, tuple[int, int, int]]:
        usages = [part.usage for site in self._sites for part in site.sites]
        return {usage: (usage.offloaded, usage.trusted, usage.passing) for usage in usages}

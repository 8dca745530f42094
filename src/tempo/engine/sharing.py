"""Layers that take the same input are sent it once: how they are found, and how one call serves them all."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tempo.engine.adapters import Operands
from tempo.engine.dtypes import compute_dtype
from tempo.engine.product import Product
from tempo.wire.messages import Linear

if TYPE_CHECKING:
    from tempo.engine.site import Site

Parameters = Callable[[], Operands]
"""Gives what a site multiplies by and adds now."""

MAX_MISSES = 8
"""A group whose members went unused this often in a row is dissolved."""


class _Seen:
    """A tensor as it was at one moment, without keeping it alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._version = tensor._version

    def same(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is that very tensor, unchanged."""
        return self._tensor() is tensor and tensor._version == self._version


class Stash:
    """An output computed ahead of its layer's call, and everything it depends on."""

    def __init__(self, x: Tensor, operands: Operands, y: Tensor) -> None:
        self._seen = [_Seen(t) for t in (x, *operands.tensors)]
        self._mode = _mode(x, operands)
        self.y = y

    def holds_for(self, x: Tensor, operands: Operands) -> bool:
        """Whether a call with these tensors would give this output."""
        now = [x, *operands.tensors]
        return (
            len(now) == len(self._seen)
            and self._mode == _mode(x, operands)
            and all(seen.same(t) for seen, t in zip(self._seen, now, strict=True))
        )


def _mode(x: Tensor, operands: Operands) -> tuple[object, ...]:
    """What an output depends on besides tensors."""
    scale = None if operands.adapter is None else operands.adapter.scale
    return torch.is_grad_enabled(), compute_dtype(x, operands.weight), scale


class Group:
    """Sites that were seen to take the same input (query, key, value; gate and up): one product, one masked input.

    Whichever is called first computes all; the others find their output waiting.
    """

    def __init__(self, members: list[tuple[Site, Parameters]]) -> None:
        self.members = [(weakref.ref(site), parameters) for site, parameters in members]
        self.misses = 0
        self.outputs = sum(site.outputs for site, _ in members)
        """Output features of all of them."""
        first = members[0][0]
        self.product = Product(first.engine, " + ".join(site.name for site, _ in members), Linear(), first.scheme)

    def starting_with(self, leader: Site, operands: Operands) -> list[tuple[Site, Operands]]:
        """The members and their operands, ``leader`` with its own first; empty where they do not fit any more."""
        self.misses += 1
        found, weight = [(leader, operands)], operands.weight
        for ref, parameters in self.members:
            site = ref()
            if site is None or self.misses > MAX_MISSES:
                leader.engine.sharing.dissolve(self)
                return []
            if site is not leader:
                found.append((site, parameters()))
        weights = [one.weight for _, one in found]
        fits = all(w.shape[1] == weight.shape[1] and w.dtype == weight.dtype for w in weights)
        fits = fits and not any(site.secret(one.weight) for site, one in found[1:])
        return found if fits and leader.engine.together(weights) else []

    def compute(self, members: list[tuple[Site, Operands]], x: Tensor) -> Tensor:
        """Compute all members' outputs; stash all but the first, which is returned."""
        leader = members[0][0]
        first, *others = leader.compute(self.product, x, [operands for _, operands in members])
        for (site, operands), y in zip(members[1:], others, strict=True):
            site.stash(Stash(x, operands, y))
        return first


class InputSharing:
    """Learns which sites are called with one and the same tensor; from the second time on, they form a group."""

    def __init__(self) -> None:
        self._recent: deque[tuple[_Seen, Site]] = deque(maxlen=8)
        self._unsuitable: weakref.WeakSet[Site] = weakref.WeakSet()

    @staticmethod
    def possible(x: Tensor, weight: Tensor) -> bool:
        """Whether a call with these can be told from another, and may compute what others will ask for."""
        if x.is_inference() or weight.is_inference():
            return False  # no version counters
        # Under saved-tensor hooks (`torch.utils.checkpoint`) a recomputation must save what the first pass saved,
        # call by call, whether or not a group was found in between.
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is None

    def noticed(self, site: Site, x: Tensor, parameters: Parameters) -> None:
        """Note that ``site`` is being called with ``x``; may make it the head of a group."""
        if site in self._unsuitable:
            return
        neighbours, site.neighbours = site.neighbours, []
        if len(neighbours) > 1 and all(other.group is None for other, _ in neighbours):
            group = Group(neighbours)
            for other, _ in neighbours:
                other.group = group
            return
        for seen, first in self._recent:
            if seen.same(x) and first is not site and first.neighbours and first.scheme is site.scheme:
                first.neighbours.append((site, parameters))
                return
        site.neighbours = [(site, parameters)]
        self._recent.append((_Seen(x), site))

    def dissolve(self, group: Group) -> None:
        """Undo a group whose members turned out not to belong together."""
        for ref, _ in group.members:
            site = ref()
            if site is not None:
                site.group = None
                self._unsuitable.add(site)

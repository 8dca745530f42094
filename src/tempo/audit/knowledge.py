"""What an attacker knows besides the transcript."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from tempo.audit.samples import Samples
from tempo.audit.transcript import View

Fact = Literal["architecture", "base", "data"]
FACTS: tuple[Fact, ...] = ("architecture", "base", "data")


@dataclass(frozen=True)
class Knowledge:
    """What an attacker knows; None is what it does not.

    Attributes:
        architecture: Builds the victim's network with weights of no meaning. Whoever has it also has Tempo, and so
            knows which layers go out and how they are grouped.
        base: The public checkpoint that training started from, by parameter names.
        data: Samples of the same distribution as the victim's, but none of the victim's own.
        trusted: Patterns of the layers that were kept trusted; part of the architecture.
    """

    architecture: Callable[[], nn.Module] | None = None
    base: Mapping[str, Tensor] | None = None
    data: Samples | None = None
    trusted: tuple[str, ...] = ()

    @cached_property
    def facts(self) -> frozenset[Fact]:
        """What is known, by name."""
        return frozenset(fact for fact in FACTS if getattr(self, fact) is not None)

    def only(self, facts: frozenset[Fact]) -> Knowledge:
        """The same, reduced to ``facts``."""
        kept = {fact: getattr(self, fact) for fact in FACTS if fact in facts}
        return Knowledge(**kept, trusted=self.trusted)

    def names(self, view: View) -> dict[int, list[str]]:
        """Names of the modules behind each product of ``view``, several where they share an input.

        The attacker runs Tempo on a network of its own and aligns the order of products within a step. Empty where the
        architecture is not known, the input's shape cannot be told without samples, or nothing fits.
        """
        if self.architecture is None or self.data is None:
            return {}
        return self._aligned(view, unfold=self.unfolds(view))

    def unfolds(self, view: View) -> bool:
        """Whether spatial convolutions were sent as patches, as far as the architecture tells."""
        return not self._aligned(view, unfold=False) and bool(self._aligned(view, unfold=True))

    def _aligned(self, view: View, *, unfold: bool) -> dict[int, list[str]]:
        """`names`, if spatial convolutions were sent as patches, or as they are."""
        from tempo.audit.lab import product_order

        if self.architecture is None or self.data is None:
            return {}
        ours = product_order(self.architecture(), self.data.inputs[:2], self.trusted, unfold=unfold)
        # Of two operators that hold half the columns each, one sees half the output features.
        fitting = [(names, {shape, (shape[0] // 2, *shape[1:])}) for names, shape in ours]
        # A scheme keeps products at home that are too small for it: the worker never saw their shapes.
        seen = {tuple(call.w.shape) for call in view.calls}
        fitting = [(names, shapes) for names, shapes in fitting if shapes & seen]
        for step in view.steps:
            calls = [call for call in view.at(step) if call.y is not None]
            for start in range(len(calls) - len(fitting) + 1 if fitting else 0):
                part = calls[start : start + len(fitting)]
                if all(tuple(call.w.shape) in shapes for call, (_, shapes) in zip(part, fitting, strict=True)):
                    return {call.layer: names for call, (names, _) in zip(part, fitting, strict=True)}
        return {}

    def base_weight(self, names: list[str], shape: tuple[int, ...]) -> Tensor | None:
        """The public weight behind a product: its members' stacked, output features first; None where unknown.

        Args:
            names: The members.
            shape: Of ``w~``; a convolution's weight is flattened where that is a matrix.
        """
        if self.base is None:
            return None
        parts = [self.base.get(f"{name}.weight") for name in names]
        found = [part for part in parts if part is not None]
        if not parts or len(found) < len(parts):
            return None
        stacked = torch.cat([part.double() for part in found])
        return stacked.flatten(1) if len(shape) == 2 else stacked

    def base_candidates(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Public weights that a masked one of this shape may come from, in float64; needs ``base`` alone.

        Neighbouring weights stack where layers share an input (query, key, value); a matrix may be stored transposed;
        a 1×1 convolution travels flat; a worker may hold half of the output features (a base has twice the rows then).

        Args:
            shape: Of ``w~``, as the worker has it.

        Returns:
            By name, each of the rows of ``shape`` or twice as many; the exact ones alone where there are any.
        """
        matrix = len(shape) == 2  # of a convolution that was unfolded, or a layer's own
        parameters = [(name, w.double()) for name, w in (self.base or {}).items() if w.dim() > 1]
        weights = [(name, w.flatten(1) if matrix else _flat(w)) for name, w in parameters]
        found: dict[str, Tensor] = {}
        for rows in (shape[0], 2 * shape[0]):
            for number, (name, w) in enumerate(weights):
                if w.dim() == 2 and tuple(w.T.shape) == (rows, *shape[1:]):
                    found[f"{name} transposed"] = w.T
                stacked, names = [], []
                for member, part in weights[number : number + 4]:
                    if tuple(part.shape[1:]) != shape[1:]:
                        break
                    stacked.append(part)
                    names.append(member)
                    if sum(len(each) for each in stacked) == rows:
                        found[" + ".join(names)] = torch.cat(stacked)
            if found:
                break
        return found


def _flat(w: Tensor) -> Tensor:
    """A 1×1 convolution's weight as the matrix that it is."""
    return w.flatten(1) if all(size == 1 for size in w.shape[2:]) else w

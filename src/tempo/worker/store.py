"""What one session keeps at the worker: weights, all that belongs to them, and operands, by number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, final

from torch import Tensor

from tempo.wire.messages import Product, Rule
from tempo.worker.budget import Account
from tempo.worker.compute import Compute, Incoming, Kept
from tempo.worker.refusal import Refusal
from tempo.worker.update import STATES, states

PARTS: Final = ("w", "gradient", *STATES)
"""What there may be of a weight, each part of the shape and dtype of ``w``."""


@final
class Numbers:
    """Numbers are chosen by the trusted side and mean nothing here; a number used again replaces what it held."""

    def __init__(self, compute: Compute, account: Account) -> None:
        self._compute, self._account = compute, account
        self._weights: dict[int, dict[str, Kept]] = {}
        self._operands: dict[int, Kept] = {}

    def put_weight(self, number: int, incoming: dict[str, Incoming]) -> dict[str, Tensor]:
        """Keep a weight and what comes with it, by the names of `PARTS`; all of it is taken out of ``incoming``."""
        self.forget(weights=[number])
        parts: dict[str, Kept] = {}
        try:
            while incoming:
                name, arrived = incoming.popitem()
                parts[name] = self._compute.keep(arrived, self._account)
        except BaseException:
            _free(parts)
            raise
        self._weights[number] = parts
        return {name: kept.tensor for name, kept in parts.items()}

    def put_operand(self, number: int, incoming: Incoming) -> Tensor:
        """Keep a forward operand."""
        self.forget(operands=[number])
        self._operands[number] = self._compute.keep(incoming, self._account)
        return self._operands[number].tensor

    def weight(self, number: int, part: str = "w") -> Tensor:
        """The weight under ``number``, or another part of it, or `Refusal`."""
        parts = self._weights.get(number, {})
        if part in parts:
            return parts[part].tensor
        what = f"{part} of weight {number}" if parts else f"weight {number}"
        raise Refusal("unknown-number", f"{what} is not stored here")

    def operand(self, number: int) -> Tensor:
        """The operand under ``number``, or `Refusal`."""
        if kept := self._operands.get(number):
            return kept.tensor
        raise Refusal("unknown-number", f"operand {number} is not stored here")

    def accumulate(self, number: int, product: Product, g: Tensor, x: Tensor) -> None:
        """Add the gradient from ``g`` and ``x`` to that of the weight; `Refusal` if there is no memory for it."""
        parts = self._weights[number]
        if "gradient" not in parts:
            parts["gradient"] = self._compute.zeros(parts["w"].tensor, self._account)
        with self._all_or_nothing(number):
            self._compute.accumulate(product, g, x, parts["gradient"].tensor)

    def update(self, number: int, rule: Rule, scale: float) -> None:
        """Change the weight by its gradient times ``scale``, and drop the gradient.

        Raises:
            Refusal: There is no memory for what ``rule`` keeps; nothing was changed.
        """
        parts = self._weights[number]
        fresh = self._zeros([name for name in states(rule) if name not in parts], parts["w"].tensor)
        state: dict[str, Tensor] = {name: parts[name].tensor for name in STATES if name in parts}
        parts.update(fresh)
        with self._all_or_nothing(number):
            self._compute.update(rule, scale, parts["w"].tensor, parts["gradient"].tensor, state)
            for name in fresh.keys() & state.keys():
                fresh[name].tensor.copy_(state[name])  # into memory that is accounted for
        parts.pop("gradient").free()

    def forget(self, weights: Iterable[int] = (), operands: Iterable[int] = (), gradients: Iterable[int] = ()) -> None:
        """Drop what these numbers hold, if anything."""
        for number in weights:
            _free(self._weights.pop(number, {}))
        for number in operands:
            if kept := self._operands.pop(number, None):
                kept.free()
        for number in gradients:
            if kept := self._weights.get(number, {}).pop("gradient", None):
                kept.free()

    def _zeros(self, names: list[str], w: Tensor) -> dict[str, Kept]:
        made: dict[str, Kept] = {}
        try:
            for name in names:
                made[name] = self._compute.zeros(w, self._account)
        except BaseException:
            _free(made)
            raise
        return made

    @contextmanager
    def _all_or_nothing(self, number: int) -> Iterator[None]:
        """A weight whose change failed half way is dropped, so that nobody takes it for what it should be."""
        try:
            yield
        except BaseException:
            self.forget(weights=[number])
            raise


def _free(parts: dict[str, Kept]) -> None:
    for kept in parts.values():
        kept.free()

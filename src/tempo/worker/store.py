"""What one session keeps at the worker: weights and operands by number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from torch import Tensor

from tempo.worker.budget import Account
from tempo.worker.compute import Compute, Incoming, Kept
from tempo.worker.refusal import Refusal


@final
class Numbers:
    """Numbers are chosen by the trusted side and mean nothing here; a number used again replaces what it held."""

    def __init__(self, compute: Compute, account: Account) -> None:
        self._compute, self._account = compute, account
        self._weights: dict[int, Kept] = {}
        self._operands: dict[int, Kept] = {}

    def put_weight(self, number: int, incoming: Incoming) -> Tensor:
        """Keep a weight."""
        return self._put(self._weights, number, incoming)

    def put_operand(self, number: int, incoming: Incoming) -> Tensor:
        """Keep a forward operand."""
        return self._put(self._operands, number, incoming)

    def weight(self, number: int) -> Tensor:
        """The weight under ``number``, or `Refusal`."""
        return self._get(self._weights, number, "weight")

    def operand(self, number: int) -> Tensor:
        """The operand under ``number``, or `Refusal`."""
        return self._get(self._operands, number, "operand")

    def forget(self, weights: Iterable[int], operands: Iterable[int]) -> None:
        """Drop what these numbers hold, if anything."""
        for table, numbers in (self._weights, weights), (self._operands, operands):
            for number in numbers:
                if kept := table.pop(number, None):
                    kept.free()

    def _put(self, table: dict[int, Kept], number: int, incoming: Incoming) -> Tensor:
        replaced = table.pop(number, None)
        if replaced:
            replaced.free()
        table[number] = self._compute.keep(incoming, self._account)
        return table[number].tensor

    def _get(self, table: dict[int, Kept], number: int, what: str) -> Tensor:
        if kept := table.get(number):
            return kept.tensor
        raise Refusal("unknown-number", f"{what} {number} is not stored here")

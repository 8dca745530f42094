"""A masked weight that workers hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from tempo.errors import WorkerLacksWeightError
from tempo.schemes.base import EncodedWeight, Operand, Target
from tempo.verify.checks import WeightCheck
from tempo.wire.integers import digest
from tempo.wire.messages import Store

if TYPE_CHECKING:
    from tempo.engine.batch import Batch
    from tempo.engine.product import Product


class StoredWeight:
    """A masked weight on workers, until it is garbage; or a public one, of integers.

    Args:
        product: That it belongs to.
        encoded: The weight.
        targets: The workers that get it.
        dtype: Of the product.
        checks: Of answers, by worker.
        public: The rows of each public weight that it is made of: workers are asked whether they have them, and sent
            what they lack. Empty if it is masked.
        sendable: Whether it may be sent; else workers have to have it.

    Raises:
        WorkerLacksWeightError: A worker has not what it said it had.
    """

    def __init__(
        self,
        product: Product,
        encoded: EncodedWeight,
        targets: Sequence[Target],
        dtype: torch.dtype,
        checks: dict[int, WeightCheck],
        public: Sequence[int] = (),
        sendable: bool = True,
    ) -> None:
        self._links = product.engine.links
        self.encoded = encoded
        self.dtype = dtype
        self.workers = [target.worker for target in targets]
        self.shapes_w = {operand.worker: tuple(operand.tensors["w"].shape) for operand in encoded.operands}
        self.number = product.engine.new_number()
        self.rows_served = 0
        self.banned = len(product.engine.crew.banned)
        self.checks = checks
        batch = product.engine.batch(product)
        self.unconfirmed: list[Batch] = [batch]
        """What workers were asked to do to the weight, and need only acknowledge."""
        there = self._found(batch, encoded.operands, public) if public else set()
        if not sendable:
            self._demand(product, there)
        for operand in encoded.operands:
            if operand.worker not in there:
                batch.post(operand, Store, {}, weight=self.number)
        self.posted = list(batch.posted.values())
        if public:
            encoded.operands.clear()  # what anyone may have is not kept here, too

    def __del__(self) -> None:
        for worker in self.workers:
            self._links[worker].forget(weights=[self.number])

    def _found(self, batch: Batch, operands: Sequence[Operand], public: Sequence[int]) -> set[int]:
        """Have workers take the weight from a checkpoint of their own; returns those that could."""
        digests = tuple(digest(part) for part in operands[0].tensors["w"].split(list(public)))
        for operand in operands:
            batch.post(replace(operand, tensors={}), Store, {}, weight=self.number, digests=digests)
        return {operand.worker for operand in operands}.difference(batch.acknowledged())

    def _demand(self, product: Product, there: set[int]) -> None:
        for worker in self.workers:
            if worker not in there:
                address = product.engine.links[worker].address
                error = WorkerLacksWeightError(
                    f"layer {product.name!r}: worker {address} lacks its weight, which all workers had when the model "
                    "was protected; it was not sent, since nobody said base='public'"
                )
                error.worker = worker
                raise error

    def confirm(self) -> None:
        """Raise what kept a worker from storing or changing the weight, before its consequences are met."""
        while self.unconfirmed:
            self.unconfirmed[0].acknowledged()
            del self.unconfirmed[0]

"""A masked weight that workers hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tempo.schemes.base import EncodedWeight, Target
from tempo.verify.checks import WeightCheck
from tempo.wire.messages import Store

if TYPE_CHECKING:
    from tempo.engine.batch import Batch
    from tempo.engine.product import Product


class StoredWeight:
    """A masked weight on workers, until it is garbage."""

    def __init__(
        self,
        product: Product,
        encoded: EncodedWeight,
        targets: Sequence[Target],
        dtype: torch.dtype,
        checks: dict[int, WeightCheck] | None = None,
    ) -> None:
        engine = product.engine
        self.encoded = encoded
        self.dtype = dtype
        self.workers = [target.worker for target in targets]
        self.shapes_w = {operand.worker: tuple(operand.tensors["w"].shape) for operand in encoded.operands}
        self.number = engine.new_number()
        self.rows_served = 0
        self.banned = len(engine.crew.banned)
        if checks is None:
            exact = product.scheme.traits.exact
            checks = {} if exact else engine.verifier.weights(product, encoded.operands)
        self.checks = checks
        batch = engine.batch(product)
        self.unconfirmed: list[Batch] = [batch]
        """What workers were asked to do to the weight, and need only acknowledge."""
        engine.forget_after(self, self.workers, weight=self.number)
        for operand in encoded.operands:
            batch.post(operand, Store, {}, weight=self.number)
        self.posted = list(batch.posted.values())

    def confirm(self) -> None:
        """Raise what kept a worker from storing or changing the weight, before its consequences are met."""
        while self.unconfirmed:
            self.unconfirmed[0].acknowledged()
            del self.unconfirmed[0]

"""Which answers are checked, by checks made of what is sent; a failed one becomes an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tempo.errors import WorkerLiedError
from tempo.schemes.base import Operand, Target
from tempo.schemes.reply import Tally
from tempo.verify.checks import GradientCheck, InputCheck, Residual, WeightCheck
from tempo.verify.policy import Policy
from tempo.verify.sketch import Sketch
from tempo.wire.blocks import snap_
from tempo.wire.layout import is_last

if TYPE_CHECKING:
    from tempo.engine.engine import Engine
    from tempo.engine.product import Product

_WHAT = {"y": "output", "dx": "input gradient", "dw": "weight gradient", "w": "weight"}


class Verifier:
    """Makes the checks of one session. Vectors come from its key schedule, under labels of their own.

    Args:
        policy: ``off``, ``always`` or ``sample:P``, as in the settings.
    """

    def __init__(self, policy: str) -> None:
        self.policy = Policy(policy)

    def tally_of_weight(
        self, product: Product, begun: dict[int, tuple[WeightCheck, Tally]], worker: int, w: Tensor
    ) -> Tally | None:
        """What a check of ``w`` needs of it, if that can be summed while it is masked; the check is ``begun``."""
        engine = product.engine
        if not self.policy.share or product.scheme.traits.exact or engine.settings.wire_dtype == "int8" or w.dim() > 2:
            return None
        check = WeightCheck(product.kind, w, engine.keys.fresh(product.number, "verify-w"), written=False)
        if (tally := check.tally()) is not None:
            begun[worker] = check, tally
        return tally

    def weights(
        self,
        product: Product,
        operands: Sequence[Operand],
        begun: Mapping[int, tuple[WeightCheck, Tally]] | None = None,
    ) -> dict[int, WeightCheck]:
        """Checks of a weight about to be stored, by worker; those ``begun`` by `tally_of_weight` are completed."""
        if not self.policy.share:
            return {}
        engine, checks = product.engine, {}
        with engine.stats.timed("verify", "w", product.name):
            for o in operands:
                w = _as_it_arrives(engine, o.tensors["w"])
                if begun and o.worker in begun:
                    check, tally = begun[o.worker]
                    check.sent(w, tally)
                else:
                    check = WeightCheck(product.kind, w, engine.keys.fresh(product.number, "verify-w"))
                checks[o.worker] = check
        return checks

    def inputs(
        self,
        product: Product,
        weights: Mapping[int, WeightCheck],
        targets: Sequence[Target],
        *,
        keep: bool,
        want_y: bool,
    ) -> dict[int, InputCheck]:
        """Checks of an input about to be masked, by worker; none if this call is not chosen."""
        if not weights or not self.policy.chooses():
            return {}
        fresh = partial(product.engine.keys.fresh, product.number, "verify-x")
        with product.engine.stats.timed("verify", "x", product.name):
            return {
                target.worker: InputCheck(weights[target.worker], fresh(), keep=keep, want_y=want_y)
                for target in targets
                if target.worker in weights
            }

    def tallies(self, engine: Engine, wanted: Mapping[int, Tally | None]) -> dict[int, Tally]:
        """What can be summed while it is masked: what travels as it is written."""
        if engine.settings.wire_dtype == "int8":
            return {}
        return {worker: tally for worker, tally in wanted.items() if tally is not None}

    def sent(
        self,
        product: Product,
        inputs: Mapping[int, InputCheck],
        operands: Sequence[Operand],
        tallies: Mapping[int, Tally],
    ) -> None:
        """Have ``inputs`` keep what they need of what is about to be sent."""
        with product.engine.stats.timed("verify", "x", product.name):
            for o in operands if inputs else ():
                inputs[o.worker].sent(_as_it_arrives(product.engine, o.tensors["x"]), tallies.get(o.worker))

    def gradients(
        self,
        product: Product,
        inputs: Mapping[int, InputCheck],
        operands: Sequence[Operand],
        tallies: Mapping[int, Tally],
        *,
        want_dx: bool,
        want_dw: bool,
    ) -> dict[int, GradientCheck]:
        """Checks of a gradient about to be sent, by worker."""
        if not inputs:
            return {}
        with product.engine.stats.timed("verify", "g", product.name):
            return {
                o.worker: inputs[o.worker].backward(
                    _as_it_arrives(product.engine, o.tensors["g"]),
                    want_dx=want_dx,
                    want_dw=want_dw,
                    tally=tallies.get(o.worker),
                )
                for o in operands
            }

    def judge_norm(self, address: str, step: int, norm: float, sketch: Sketch) -> None:
        """Raise `WorkerLiedError` if a gradient cannot be as long as a worker says."""
        if not sketch.plausible(norm):
            raise WorkerLiedError(
                f"worker {address} says in step {step} that a gradient has length {norm:.3g}, which sketches rule out"
            )

    def judge(self, address: str, step: int, name: str, answer: Tensor, residual: Residual) -> None:
        """Raise `WorkerLiedError` if a check failed."""
        if not residual.passed:
            where = (
                f"row {residual.row} is off by {residual.ratio:.3g} times its tolerance "
                f"(residual {residual.residual:.3g}, tolerance {residual.tolerance:.3g})"
            )
            raise self.lie(address, step, name, answer, where)

    def lie(self, address: str, step: int, name: str, answer: Tensor, where: str) -> WorkerLiedError:
        """The error about a wrong answer."""
        return WorkerLiedError(
            f"worker {address} gave a wrong {_WHAT.get(name, name)} of shape {tuple(answer.shape)} in step {step}: "
            f"{where}; the answer was not used"
        )


def _as_it_arrives(engine: Engine, operand: Tensor) -> Tensor:
    """Rounded as it will be on its way, so that checks are of what workers multiply. Packing rounds no further."""
    packed = engine.settings.wire_dtype == "int8" and operand.dtype == torch.float32
    if packed:
        snap_(operand.movedim(1, -1) if is_last(operand) else operand)  # in place, in the order in which it travels
    return operand

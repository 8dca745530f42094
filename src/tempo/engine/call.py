"""One forward call of a product, and the backward pass through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tempo.engine.dtypes import answer_dtype
from tempo.engine.geometry import flops, output_shape
from tempo.errors import WorkerError
from tempo.schemes.base import EncodedGradient, EncodedInput, Operand, Recall, Target
from tempo.schemes.low_rank import LowRank, add_all, watched
from tempo.schemes.sandwich import add_biases
from tempo.verify.checks import InputCheck
from tempo.wire.messages import Backward, Forward

if TYPE_CHECKING:
    from tempo.engine.batch import Batch
    from tempo.engine.product import Product
    from tempo.engine.residence import Residence
    from tempo.engine.stored import StoredWeight

Saved = Callable[[], tuple[Tensor, list[Tensor]]]
"""What autograd saved of a call: its input and its weights; raises where they were changed since."""

Gradients = tuple[Tensor | None, Callable[[], list[Tensor]] | None]
"""``dX``, and what awaits ``dW``, as far as wanted."""


class Finish(Protocol):
    """Awaits and unmasks gradients; ``dX`` gets ``added`` besides."""

    def __call__(self, added: LowRank | None = None, /) -> Gradients:
        """Once."""


class WeightGradients:
    """``dW`` of one call: workers compute it while the backward pass goes on, and nobody needs it before the optimizer.

    Operands are kept until it is there, in case that it must be computed again: it is taken as soon as it has arrived.
    """

    def __init__(self, call: Call, batch: Batch, encoded: EncodedGradient, g: Tensor, saved: Saved) -> None:
        self._call = call
        self._batch = batch
        self._encoded: EncodedGradient | None = encoded
        self._g = g
        self._parts: list[Tensor] | None = None
        self._operands: tuple[Tensor, list[Tensor]] | None = None
        with suppress(RuntimeError):  # a weight was changed since: legal where no dX is wanted; no second try, then
            self._operands = saved()
        call.product.engine.unsettled.add(self)

    def __call__(self) -> list[Tensor]:
        """Await it: one gradient for each weight."""
        if self._parts is None:
            self._parts = self._await()
            self._encoded = self._operands = None
        return self._parts

    @property
    def arrived(self) -> bool:
        """Whether nothing need be waited for."""
        return self._parts is None and self._batch.arrived("dw")

    def _await(self) -> list[Tensor]:
        assert self._encoded is not None  # noqa: S101 - until it was awaited
        try:
            return self._batch.decoded("dw", partial(self._encoded.decode_weight_gradient, sizes=self._call.sizes))
        except WorkerError as error:
            if self._operands is None:
                raise
            product = self._call.product
            product.engine.dismiss(error)
            _, again = product.repeat(*self._operands, self._g, want_dx=False, want_dw=True)
            assert again is not None  # noqa: S101 - it was wanted
            return again()


class Call:
    """One forward call, and the backward pass through it.

    Args:
        product: What is computed.
        stored: The weight on the workers.
        targets: The workers that take part.
        encoded: The input under masks.
        weight: Recalls the plain weight.
        shapes: Of the input and the weight.
        sizes: Output features of each member of the product.
        keep: Whether a weight gradient may be wanted.
        residence: Where the weight lives, if that is on a worker.
        checks: Of what workers answer, by worker.
    """

    def __init__(
        self,
        product: Product,
        stored: StoredWeight,
        targets: Sequence[Target],
        encoded: EncodedInput,
        weight: Recall,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        sizes: list[int],
        keep: bool,
        residence: Residence | None,
        checks: dict[int, InputCheck],
    ) -> None:
        self.product = product
        self.stored = stored
        self.targets = targets
        self.encoded = encoded
        self.weight = weight
        self.residence = residence
        self.versions = [] if residence is None else [p._version for p in residence.parameters]
        self.shapes: tuple[tuple[int, ...], tuple[int, ...]] = shapes
        self.sizes = sizes
        self.shapes_x = {o.worker: o.shape("x") for o in encoded.operands}
        self.operand = 0
        self.differentiated = False
        self.total: Tensor | None = None
        """The sum of the rows of the gradient that was sent last, if masking it made that."""
        self.checks = checks
        self._resent: Batch | None = None
        if keep:
            self.operand = product.engine.new_number()

    def __del__(self) -> None:
        for worker in self.shapes_x if self.operand else ():
            self.product.engine.links[worker].forget(operands=[self.operand])

    def begin(self) -> Batch:
        """Send ``x~``."""
        engine, kind = self.product.engine, self.product.scheme.asks(self.product.kind)
        batch = engine.batch(self.product)
        for operand in self.encoded.operands:
            shape_x, shape_w = self.shapes_x[operand.worker], self.stored.shapes_w[operand.worker]
            dtype = operand.answers or answer_dtype(engine.settings.wire_dtype, operand.tensors["x"].dtype)
            wants = {"y": (output_shape(kind, shape_x, shape_w), dtype)}
            check = self.checks.get(operand.worker)
            fields: dict[str, Any] = {"weight": self.stored.number, "operand": self.operand, "product": kind}
            batch.post(operand, Forward, wants, {"y": check.output_check()} if check else None, **fields)
            if operand.stands_for is None:  # products of a seed are of no use by themselves
                engine.stats.flops_offloaded += flops(kind, shape_x, shape_w)
        return batch

    def finish(
        self, batch: Batch, x: Tensor, biases: Sequence[Tensor | None], added: Sequence[LowRank | None]
    ) -> list[Tensor]:
        """Await ``y~``, unmask, add ``biases`` and ``added``. ``x`` is only for the record of the truth, if any."""
        engine = self.product.engine
        self.stored.confirm()
        at_once = self._adds_at_once()
        outputs = batch.decoded(
            "y",
            lambda replies: self.encoded.decode_output(
                replies, self.sizes, () if engine.truth else biases, added if at_once else ()
            ),
        )
        if engine.truth is not None:
            self._record(batch, x, outputs)
            add_biases(outputs, biases)
        if not at_once:
            add_all(outputs, added)
        return outputs

    def _adds_at_once(self) -> bool:
        """Whether what adapters add may be added while an answer is decoded, which is not what is seen of it."""
        return self.product.engine.truth is None and not watched()

    def resend(self, x: Tensor) -> None:
        """Send ``x~`` to be kept, for a gradient that follows; no output is wanted."""
        self._resent = batch = self.product.engine.batch(self.product)
        for operand in self.encoded.operands:
            fields: dict[str, Any] = {
                "weight": self.stored.number,
                "operand": self.operand,
                "product": self.product.scheme.asks(self.product.kind),
            }
            batch.post(operand, Forward, {}, **fields)
        self._record(batch, x, [])

    def _record(self, batch: Batch, x: Tensor, outputs: Sequence[Tensor]) -> None:
        truth = self.product.engine.truth
        for operand in self.encoded.operands if truth is not None else ():
            plain = {"x": x[operand.rows]} | self.encoded.secrets(operand.worker)
            if outputs:
                plain["y"] = _part(torch.cat(list(outputs), 1), operand)
            truth.record(batch.posted[operand.worker], "forward", plain)  # type: ignore[union-attr]

    def _confirm(self) -> None:
        """Raise what kept a worker from taking what this call sent before its gradient."""
        self.stored.confirm()
        if self._resent is not None:
            self._resent.acknowledged()
            self._resent = None

    def begin_backward(self, g: Tensor, saved: Saved, *, want_dx: bool, want_dw: bool) -> Finish:
        """Send ``g~``; return what awaits and unmasks the gradients.

        Where the scheme would rather not send rows of ``g`` that are zero, the others go out in a call of their own.
        """
        product, self.total = self.product, None
        product.engine.check_open()
        with product.engine.stats.timed("mask", "g", product.name):
            rows = product.scheme.rows_to_repeat(g, *self.shapes, want_dw=want_dw)
        if self.residence is not None:
            if [p._version for p in self.residence.parameters] != self.versions:
                raise RuntimeError(
                    f"layer {product.name!r}: its weight, needed for gradient computation, has been modified by an "
                    "inplace operation, an optimizer's step say, since the forward pass"
                )
            if rows is not None and want_dw:
                self.residence.end("rows of its output gradient are zero")
        elements, (x, w) = product.engine.stats.elements, self.shapes
        live = x[0] if rows is None else rows.shape[0]  # zeros need not travel
        elements["g"] += live * prod(g.shape[1:])
        elements["dx"] += want_dx * live * prod(x[1:])
        elements["dw"] += (want_dw and self.residence is None) * prod(w)
        again = partial(self._again, g, saved, rows, want_dx=want_dx, want_dw=want_dw)
        if rows is not None or self.differentiated or not self._still_holds(want_dw):
            return again
        self.differentiated = True

        def failed(error: WorkerError) -> None:
            if self.residence is not None and want_dw:
                self.residence.doubt()  # whether it has this gradient is not known
            product.engine.dismiss(error)

        try:
            finish = self.begin_sending(g, saved, want_dx=want_dx, want_dw=want_dw)
        except WorkerError as error:
            failed(error)
            return again

        def finish_or_again(added: LowRank | None = None, /) -> Gradients:
            try:
                return finish(added)
            except WorkerError as error:
                failed(error)
            return again(added)

        return finish_or_again

    def _again(
        self,
        g: Tensor,
        saved: Saved,
        rows: Tensor | None,
        added: LowRank | None = None,
        *,
        want_dx: bool,
        want_dw: bool,
    ) -> Gradients:
        """Under fresh masks; only ``rows``, unless that is None."""
        product, (x, weights) = self.product, saved()
        if rows is None:
            dx, dw = product.repeat(x, weights, g, want_dx=want_dx, want_dw=want_dw)
        else:
            live = x.index_select(0, rows), weights, g.index_select(0, rows)
            part, dw = product.repeat(*live, want_dx=want_dx, want_dw=want_dw)
            dx = None if part is None else x.new_zeros(x.shape).index_copy_(0, rows, part)
        if dx is not None and added is not None:
            added.add_to(dx)
        return dx, dw

    def _still_holds(self, want_dw: bool) -> bool:
        """Whether the weight is where it was in the forward pass, if it has to take a gradient there.

        A gradient that was clipped since is not added to: its factor is for what it was then.
        """
        residence = self.residence
        return residence is None or not want_dw or (residence is self.product.residence and residence.scale == 1.0)

    def send(self, g: Tensor, saved: Saved, *, want_dx: bool, want_dw: bool) -> Gradients:
        """Send ``g~`` as it is; return what `backward` does.

        Raises:
            WorkerError: A worker failed; nothing was tried elsewhere yet.
        """
        return self.begin_sending(g, saved, want_dx=want_dx, want_dw=want_dw)()

    def begin_sending(self, g: Tensor, saved: Saved, *, want_dx: bool, want_dw: bool) -> Finish:
        """Send ``g~`` as it is; return what awaits and unmasks the gradients. Either may raise as `send`."""
        engine, residence = self.product.engine, self.residence if want_dw else None
        kind = self.product.scheme.asks(self.product.kind)
        engine.keys.check_process()
        answered = want_dw and residence is None
        wanted = {
            worker: check.gradient_tally(want_dx=want_dx, want_dw=answered) for worker, check in self.checks.items()
        }
        tallies = engine.verifier.tallies(engine, wanted)
        with engine.stats.timed("mask", "g", self.product.name):
            encoded = self.encoded.encode_gradient(
                g,
                engine.keys.fresh(self.product.number, "g"),
                self.product.maps,
                lambda: saved()[0],
                self.weight,
                want_dw=want_dw,
                tallies=tallies,
            )
        self.total = encoded.total
        if not encoded.finite:
            engine.warn_if_not_finite(self.product.name, g, g.sum(1))
        if residence is not None:
            if encoded.corrects_weight_gradient:
                for operand in encoded.operands:
                    engine.links[operand.worker].buffers.release(operand.tensors["g"])
                residence.end("rows or features that are zero had to be filled")
                return partial(self._again, g, saved, None, want_dx=want_dx, want_dw=want_dw)
            residence.accumulates(saved()[0], g)
        engine.stats.encryptions["g"] += 1
        engine.backward_seen()
        checks = engine.verifier.gradients(
            self.product, self.checks, encoded.operands, tallies, want_dx=want_dx, want_dw=answered
        )
        batch = engine.batch(self.product)
        for operand in encoded.operands:
            dtype = operand.answers or answer_dtype(engine.settings.wire_dtype, operand.tensors["g"].dtype)
            shape_x, shape_w = self.shapes_x[operand.worker], self.stored.shapes_w[operand.worker]
            wants = {}
            if want_dx:
                wants["dx"] = (shape_x, dtype)
            if answered:
                wants["dw"] = (shape_w, dtype)
            check = checks.get(operand.worker)
            by_name = {"dx": check.input_gradient_check, "dw": check.weight_gradient_check} if check else {}
            fields: dict[str, Any] = {"weight": self.stored.number, "operand": self.operand, "product": kind}
            accumulate = {} if residence is None else {"accumulate": True}
            batch.post(
                operand, Backward, wants, {name: by_name[name]() for name in wants if check}, **fields, **accumulate
            )
            if operand.stands_for is None:
                engine.stats.flops_offloaded += (want_dx + want_dw) * flops(kind, shape_x, shape_w)
        self._confirm()
        if not (want_dx or answered):
            self.stored.unconfirmed.append(batch)
        dw = WeightGradients(self, batch, encoded, g, saved) if answered else None

        def finish(added: LowRank | None = None, /) -> Gradients:
            engine.settle()  # while workers compute what was just sent
            dx, at_once = None, self._adds_at_once()
            if want_dx:
                here = added if at_once else None
                dx = batch.decoded("dx", lambda replies: encoded.decode_input_gradient(replies, here))
            if engine.truth is not None:
                for operand in encoded.operands:
                    plain = {"g": _part(g, operand)} | ({} if dx is None else {"dx": dx[operand.rows]})
                    engine.truth.record(batch.posted[operand.worker], "backward", plain)
            if dx is not None and added is not None and not at_once:
                added.add_to(dx)
            return dx, dw

        return finish


def _part(tensor: Tensor, operand: Operand) -> Tensor:
    """The rows and output features of ``tensor`` that ``operand`` stands for."""
    part = tensor[operand.rows]
    return part if operand.columns is None else part.index_select(1, operand.columns)

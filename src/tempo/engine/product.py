"""One offloaded product: a weight (or several that share their input) kept masked on workers, and calls on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tempo.engine.dtypes import WIRE_DTYPES
from tempo.engine.fingerprint import Fingerprint
from tempo.engine.geometry import flops, output_shape
from tempo.errors import NonFiniteError, WorkerError
from tempo.schemes.base import EncodedGradient, EncodedInput, EncodedWeight, Operand, Problem, Scheme, Target
from tempo.verify.checks import InputCheck
from tempo.wire.messages import Backward, Forward, Store
from tempo.wire.messages import Product as ProductKind

if TYPE_CHECKING:
    from tempo.engine.batch import Batch
    from tempo.engine.engine import Engine


class StoredWeight:
    """A masked weight on workers, until it is garbage."""

    def __init__(self, product: Product, encoded: EncodedWeight, targets: Sequence[Target], dtype: torch.dtype) -> None:
        engine = product.engine
        self.encoded = encoded
        self.dtype = dtype
        self.workers = [target.worker for target in targets]
        self.shapes_w = {operand.worker: tuple(operand.tensors["w"].shape) for operand in encoded.operands}
        self.number = engine.new_number()
        self.rows_served = 0
        self.banned = len(engine.crew.banned)
        self.checks = engine.verifier.weights(engine, product.number, product.kind, encoded.operands)
        self._batch: Batch | None = engine.batch(product)
        engine.forget_after(self, self.workers, weight=self.number)
        for operand in encoded.operands:
            self._batch.post(operand, Store, {}, weight=self.number)
        self.posted = list(self._batch.posted.values())

    def confirm(self) -> None:
        """Raise what kept a worker from storing the weight, before its consequences are met."""
        if self._batch is not None:
            self._batch.acknowledged()
            self._batch = None


class Product:
    """A product as the trusted side keeps it across calls.

    Args:
        engine: The session's engine.
        name: Name of the layer (or layers) for messages to the user; never sent.
        kind: What workers compute.
        scheme: What masks it.
    """

    def __init__(self, engine: Engine, name: str, kind: ProductKind, scheme: Scheme) -> None:
        self.engine = engine
        self.name = name
        self.kind = kind
        self.scheme = scheme
        self.number = engine.new_number()
        self._stored: StoredWeight | None = None
        self._fingerprint: list[Fingerprint] = []

    def problem(self, dtype: torch.dtype) -> Problem:
        """This product, for the scheme, computed in ``dtype``."""
        setting = self.engine.settings.wire_dtype
        return Problem(self.kind, WIRE_DTYPES[dtype] if setting == "auto" else getattr(torch, setting))

    def call(
        self, x: Tensor, weights: Sequence[Tensor], sources: Sequence[Tensor], *, keep: bool
    ) -> tuple[list[Tensor], Call]:
        """Compute ``Y`` on workers.

        Args:
            x: Input, rows first, features second.
            weights: Weights of the members, each output features first; all of ``x``'s dtype.
            sources: The same before any conversion of dtype, to see whether they changed.
            keep: Whether a weight gradient may be wanted: workers then keep the masked input.

        Returns:
            One output per weight, and the call to send gradients through.

        Raises:
            NonFiniteError: ``x`` or a weight holds NaN or infinity.
            WorkerError: A worker failed.
        """
        while True:
            try:
                call = self._encode(x, weights, sources, keep=keep, again=False)
                return call.forward(x), call
            except WorkerError as error:
                self._stored = None  # whether workers hold it is not known
                self.engine.dismiss(error)
            except BaseException:
                self._stored = None
                raise

    def repeat(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        sources: Sequence[Tensor],
        g: Tensor,
        *,
        want_dx: bool,
        want_dw: bool,
    ) -> Gradients:
        """A call under fresh masks for a gradient alone: the same rows for another gradient, or some of them for this
        one.

        Fresh masks of features too: under the old ones, a worker could express the new rows by those that it had.
        """
        while True:
            self._stored = None
            try:
                call = self._encode(x, weights, sources, keep=want_dw, again=True)
                if want_dw:
                    call.resend(x)
                return call.send(g, lambda: (x, list(weights), list(sources)), want_dx=want_dx, want_dw=want_dw)
            except WorkerError as error:
                self.engine.dismiss(error)
            except BaseException:
                self._stored = None
                raise

    def _encode(
        self, x: Tensor, weights: Sequence[Tensor], sources: Sequence[Tensor], *, keep: bool, again: bool
    ) -> Call:
        """Mask ``x``, and the weights where workers do not hold them; ``again``: a backward pass asks for it."""
        engine = self.engine
        engine.keys.check_process()
        shape_w = (sum(len(w) for w in weights), *weights[0].shape[1:])
        work = flops(self.kind, tuple(x.shape), shape_w)
        targets = engine.targets(self.number, x.shape[0], work, self.scheme.traits.operators)
        stored = self._store(weights, sources, targets, again)
        with engine.stats.timed("mask"):
            self._check_finite(x, "input")
            encoded = stored.encoded.encode_input(
                x, engine.keys.fresh(self.number, "x"), targets, engine.empty, partial(_whole, weights)
            )
        engine.stats.encryptions["x"] += 1
        stored.rows_served += x.numel() // x.shape[1]  # of a convolution, every pixel is a row
        return Call(self, stored, encoded, (tuple(x.shape), shape_w), [len(w) for w in weights], keep)

    def _store(
        self, weights: Sequence[Tensor], sources: Sequence[Tensor], targets: Sequence[Target], again: bool
    ) -> StoredWeight:
        """The weight on the workers: the one that is there while it holds, else freshly masked."""
        engine, stored = self.engine, self._stored
        lasting = not self.scheme.traits.fresh_every_call
        with engine.stats.timed("mask"):
            fingerprint = [Fingerprint(w) for w in sources] if lasting else []
        if (
            lasting
            and stored is not None
            and stored.dtype == weights[0].dtype
            and fingerprint == self._fingerprint
            and stored.rows_served < engine.settings.rekey_rows
            and stored.banned == len(engine.crew.banned)  # what a liar held is not used again
            and {target.worker for target in targets} <= set(stored.workers)
        ):
            return stored
        self._stored = None  # lets go of the old masks even if what follows fails
        with engine.stats.timed("mask"):
            w = _whole(weights)
            self._check_finite(w, "weight")
            encoded = self.scheme.encode_weight(
                self.problem(w.dtype), w, engine.keys.fresh(self.number, "w"), targets, engine.empty
            )
        engine.stats.encryptions["w"] += 1
        if not again:
            engine.weights_changed()
        stored = StoredWeight(self, encoded, targets, w.dtype)
        if engine.truth is not None:
            for posted in stored.posted:
                engine.truth.record(posted, "store", {"w": w})
        if lasting:
            self._stored, self._fingerprint = stored, fingerprint
        return stored

    def _check_finite(self, tensor: Tensor, what: str) -> None:
        # The sum is a pass over memory that masking is about to read anyway; only a suspicious one is looked into.
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                f"layer {self.name!r}: its {what} of shape {tuple(tensor.shape)} has {count} NaN or infinite elements; "
                "it was not sent. Look at the layers before it, the learning rate and the loss scale"
            )


def _whole(weights: Sequence[Tensor]) -> Tensor:
    """The weight of a product: its members', one after the other."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


Saved = Callable[[], tuple[Tensor, list[Tensor], list[Tensor]]]
"""What autograd saved of a call: its input, its weights in the input's dtype, and in their own."""

Gradients = tuple[Tensor | None, Callable[[], list[Tensor]] | None]
"""``dX``, and what awaits ``dW``, as far as wanted."""


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
        self._operands: tuple[Tensor, list[Tensor], list[Tensor]] | None = None
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
            with self._batch.replies("dw") as replies:
                return self._encoded.decode_weight_gradient(replies, self._call.sizes)
        except WorkerError as error:
            if self._operands is None:
                raise
            product = self._call.product
            product.engine.dismiss(error)
            x, weights, sources = self._operands
            _, again = product.repeat(x, weights, sources, self._g, want_dx=False, want_dw=True)
            assert again is not None  # noqa: S101 - it was wanted
            return again()


class Call:
    """One forward call, and the backward pass through it."""

    def __init__(
        self,
        product: Product,
        stored: StoredWeight,
        encoded: EncodedInput,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        sizes: list[int],
        keep: bool,
    ) -> None:
        self.product = product
        self.stored = stored
        self.encoded = encoded
        self.shapes = shapes
        self.sizes = sizes
        self.shapes_x = {o.worker: tuple(o.tensors["x"].shape) for o in encoded.operands}
        self.operand = 0
        self.differentiated = False
        self.checks: dict[int, InputCheck] = {}
        self._resent: Batch | None = None
        if keep:
            self.operand = product.engine.new_number()
            product.engine.forget_after(self, list(self.shapes_x), operand=self.operand)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Send ``x~``, await ``y~``, unmask. ``x`` is only for the record of the truth, if there is one."""
        engine, kind = self.product.engine, self.product.kind
        self._prepare_checks(want_y=True)
        batch = engine.batch(self.product)
        for operand in self.encoded.operands:
            shape_x, shape_w = self.shapes_x[operand.worker], self.stored.shapes_w[operand.worker]
            wants = {"y": (output_shape(kind, shape_x, shape_w), operand.tensors["x"].dtype)}
            check = self.checks.get(operand.worker)
            fields: dict[str, Any] = {"weight": self.stored.number, "operand": self.operand, "product": kind}
            batch.post(operand, Forward, wants, {"y": check.output} if check else None, **fields)
            engine.stats.flops_offloaded += flops(kind, shape_x, shape_w)
        self.stored.confirm()
        with batch.replies("y") as replies:
            outputs = self.encoded.decode_output(replies, self.sizes)
        self._record(batch, x, outputs)
        return outputs

    def resend(self, x: Tensor) -> None:
        """Send ``x~`` to be kept, for a gradient that follows; no output is wanted."""
        self._prepare_checks(want_y=False)
        self._resent = batch = self.product.engine.batch(self.product)
        for operand in self.encoded.operands:
            fields: dict[str, Any] = {
                "weight": self.stored.number,
                "operand": self.operand,
                "product": self.product.kind,
            }
            batch.post(operand, Forward, {}, **fields)
        self._record(batch, x, [])

    def _prepare_checks(self, *, want_y: bool) -> None:
        product = self.product
        self.checks = product.engine.verifier.inputs(
            product.engine,
            product.number,
            self.stored.checks,
            self.encoded.operands,
            keep=bool(self.operand),
            want_y=want_y,
        )

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

    def backward(self, g: Tensor, saved: Saved, *, want_dx: bool, want_dw: bool) -> Gradients:
        """Send ``g~``; return ``dX`` at once, and what awaits and unmasks ``dW`` later.

        Where the scheme would rather not send rows of ``g`` that are zero, the others go out in a call of their own.
        """
        product = self.product
        product.engine.check_open()
        with product.engine.stats.timed("mask"):
            rows = product.scheme.rows_to_repeat(g, *self.shapes, want_dw=want_dw)
        if rows is None and not self.differentiated:
            self.differentiated = True
            try:
                return self.send(g, saved, want_dx=want_dx, want_dw=want_dw)
            except WorkerError as error:
                product.engine.dismiss(error)
        x, weights, sources = saved()
        if rows is None:
            return product.repeat(x, weights, sources, g, want_dx=want_dx, want_dw=want_dw)
        live = x.index_select(0, rows), weights, sources, g.index_select(0, rows)
        part, dw = product.repeat(*live, want_dx=want_dx, want_dw=want_dw)
        return None if part is None else x.new_zeros(x.shape).index_copy_(0, rows, part), dw

    def send(self, g: Tensor, saved: Saved, *, want_dx: bool, want_dw: bool) -> Gradients:
        """Send ``g~`` as it is.

        Raises:
            WorkerError: A worker failed; nothing was tried elsewhere yet.
        """
        engine, kind = self.product.engine, self.product.kind
        engine.keys.check_process()
        engine.settle()
        with engine.stats.timed("mask"):
            engine.warn_if_not_finite(self.product.name, g)
            encoded = self.encoded.encode_gradient(
                g,
                engine.keys.fresh(self.product.number, "g"),
                engine.empty,
                lambda: saved()[0],
                lambda: _whole(saved()[1]),
                want_dw=want_dw,
            )
        engine.stats.encryptions["g"] += 1
        engine.backward_seen()
        checks = engine.verifier.gradients(engine, self.checks, encoded.operands, want_dx=want_dx, want_dw=want_dw)
        batch = engine.batch(self.product)
        for operand in encoded.operands:
            dtype = operand.tensors["g"].dtype
            shape_x, shape_w = self.shapes_x[operand.worker], self.stored.shapes_w[operand.worker]
            wants = {}
            if want_dx:
                wants["dx"] = (shape_x, dtype)
            if want_dw:
                wants["dw"] = (shape_w, dtype)
            check = checks.get(operand.worker)
            by_name = {"dx": check.input_gradient, "dw": check.weight_gradient} if check else {}
            fields: dict[str, Any] = {"weight": self.stored.number, "operand": self.operand, "product": kind}
            batch.post(operand, Backward, wants, {name: by_name[name] for name in wants if check}, **fields)
            engine.stats.flops_offloaded += len(wants) * flops(kind, shape_x, shape_w)
        self._confirm()

        dw = WeightGradients(self, batch, encoded, g, saved) if want_dw else None
        dx = None
        if want_dx:
            with batch.replies("dx") as replies:
                dx = encoded.decode_input_gradient(replies)
        if engine.truth is not None:
            for operand in encoded.operands:
                plain = {"g": _part(g, operand)} | ({} if dx is None else {"dx": dx[operand.rows]})
                engine.truth.record(batch.posted[operand.worker], "backward", plain)
        return dx, dw


def _part(tensor: Tensor, operand: Operand) -> Tensor:
    """The rows and output features of ``tensor`` that ``operand`` stands for."""
    part = tensor[operand.rows]
    return part if operand.columns is None else part.index_select(1, operand.columns)

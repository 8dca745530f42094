"""One offloaded product: a weight, or several that share their input, and where it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tempo.engine.adapters import Adapters
from tempo.engine.away import residence_of
from tempo.engine.call import Call, Gradients
from tempo.engine.dtypes import answer_dtype, masked_dtype
from tempo.engine.fingerprint import Fingerprint
from tempo.engine.geometry import flops, output_shape
from tempo.engine.parts import CallInParts
from tempo.engine.residence import Residence, Terms
from tempo.engine.stored import StoredWeight
from tempo.engine.update_cost import update_cost
from tempo.errors import NonFiniteError, UnsafeError, WorkerError
from tempo.schemes.base import Operand, Problem, Recall, Scheme, Tallies, Target
from tempo.schemes.reply import Tally
from tempo.verify.checks import WeightCheck
from tempo.wire.layout import meant, sent_shape
from tempo.wire.messages import Linear
from tempo.wire.messages import Product as ProductKind
from tempo.worker.update import states

if TYPE_CHECKING:
    from tempo.engine.batch import Batch
    from tempo.engine.engine import Engine


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
        self.residence: Residence | None = None
        """Where the weight lives, if that is on a worker."""
        self.trusted_updates = ""
        """Why its weight is updated here although the session lets workers do that; empty: it may live there."""
        self._stored: StoredWeight | None = None
        self._fingerprint: list[Fingerprint] = []

    def problem(self, dtype: torch.dtype) -> Problem:
        """This product, for the scheme, computed in ``dtype``."""
        return Problem(self.kind, masked_dtype(self.engine.settings.wire_dtype, dtype))

    def maps(self, worker: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A send buffer of that worker's link for ``X`` or ``G``, with axes in the order in which they travel."""
        return meant(self.kind, "x", self.engine.empty(worker, sent_shape(self.kind, "x", shape), dtype))

    def call(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        adapters: Adapters | None,
        *,
        keep: bool,
    ) -> tuple[list[Tensor], Call | CallInParts]:
        """Compute ``Y`` on workers, in as many parts as pay.

        Args:
            x: Input, rows first, features second.
            weights: Weights of the members, each output features first.
            biases: What to add to each member's output, one number for each feature, or None.
            adapters: What to add besides, if anything.
            keep: Whether a weight gradient may be wanted: workers then keep the masked input.

        Returns:
            One output per weight, and the call to send gradients through.

        Raises:
            NonFiniteError: ``x`` or a weight holds NaN or infinity.
            WorkerError: A worker failed.
        """
        while True:
            try:
                pieces = x.tensor_split(self._parts(x, weights, keep))
                calls: list[Call] = []
                batches: list[Batch] = []
                for piece in pieces:
                    calls.append(
                        self._encode(piece, weights, keep=keep, again=False, first=calls[0] if calls else None)
                    )
                    batches.append(calls[-1].begin())
                added = [None] * len(weights) if adapters is None else adapters.added(x)  # while workers compute
                end, found = 0, []
                for call, batch, piece in zip(calls, batches, pieces, strict=True):
                    rows = slice(end, end := end + piece.shape[0])
                    of_piece = [None if one is None else one.of_rows(rows) for one in added]
                    found.append(call.finish(batch, piece, biases, of_piece))
                if len(calls) == 1:
                    return found[0], calls[0]
                return [torch.cat(outputs) for outputs in zip(*found, strict=True)], CallInParts(calls)
            except WorkerError as error:
                self._stored = None  # whether workers hold it is not known
                self.engine.dismiss(error)
            except BaseException:
                self._stored = None
                raise

    def repeat(self, x: Tensor, weights: Sequence[Tensor], g: Tensor, *, want_dx: bool, want_dw: bool) -> Gradients:
        """A call under fresh masks for a gradient alone: the same rows for another gradient, or some of them for this
        one.

        Fresh masks of features too: under the old ones, a worker could express the new rows by those that it had.
        """
        while True:
            self._stored = None
            try:
                if self.residence is not None:
                    self.residence.recall()
                call = self._encode(x, weights, keep=want_dw, again=True)
                if want_dw:
                    call.resend(x)
                return call.send(g, lambda: (x, list(weights)), want_dx=want_dx, want_dw=want_dw)
            except WorkerError as error:
                self.engine.dismiss(error)
            except BaseException:
                self._stored = None
                raise

    def _parts(self, x: Tensor, weights: Sequence[Tensor], keep: bool) -> int:
        """In how many parts to send ``x``. Convolutions have few rows, and resident weights sum over all of them."""
        if not isinstance(self.kind, Linear) or self.engine.settings.update != "trusted":
            return 1
        shape_w = sum(w.shape[0] for w in weights), weights[0].shape[1]
        return self.engine.planner.parts(self.scheme, (x.shape[0], x.shape[1]), shape_w, x.dtype, training=keep)

    def _encode(
        self, x: Tensor, weights: Sequence[Tensor], *, keep: bool, again: bool, first: Call | None = None
    ) -> Call:
        """Mask ``x``, and the weights where workers do not hold them.

        Args:
            x: The input.
            weights: Of the members.
            keep: Whether a weight gradient may be wanted.
            again: Whether a backward pass asks for it.
            first: The first part of the same call, whose weight is used.
        """
        engine = self.engine
        engine.keys.check_process()
        sizes = [w.shape[0] for w in weights]
        shape_w = (sum(sizes), *weights[0].shape[1:])
        work = flops(self.kind, tuple(x.shape), shape_w)
        residence = self._settled(x, weights, keep) if first is None else None
        weight: Recall
        if first is not None:
            stored, targets, weight = first.stored, first.targets, first.weight
        elif residence is not None:
            stored, targets, weight = residence.stored, [residence.target], residence.peek
        else:
            sources = [w.detach() for w in weights]
            here = [w.to(x.dtype) for w in sources]
            targets = engine.targets(self.number, x.shape[0], work, self.scheme.traits.operators)
            weight = partial(_whole, here)
            with engine.stats.timed("mask", "w", self.name):
                stored = self._store(here, sources, targets, again)
        checks = engine.verifier.inputs(self, stored.checks, targets, keep=keep and residence is None, want_y=not again)
        tallies = engine.verifier.tallies(engine, {worker: check.tally() for worker, check in checks.items()})
        with engine.stats.timed("mask", "x", self.name):
            encoded = stored.encoded.encode_input(
                x, engine.keys.fresh(self.number, "x"), targets, self.maps, weight, tallies
            )
            self._check_sendable(x, encoded.operands, tallies)
        engine.verifier.sent(self, checks, encoded.operands, tallies)
        engine.stats.encryptions["x"] += 1
        if not again:
            engine.stats.elements["x"] += x.numel()
            engine.stats.elements["y"] += prod(output_shape(self.kind, tuple(x.shape), shape_w))
        if self.scheme.traits.public_weights and torch._C._current_graph_task_id() == -1:
            engine.weights_changed()  # none of those that go out do: the next forward pass begins the next step
        stored.rows_served += x.numel() // x.shape[1]  # of a convolution, every pixel is a row
        return Call(
            self,
            stored,
            targets,
            encoded,
            weight,
            (tuple(x.shape), shape_w),
            sizes,
            keep,
            residence,
            checks,
        )

    def _check_sendable(self, x: Tensor, operands: Sequence[Operand], tallies: Tallies) -> None:
        """Raise `NonFiniteError` if ``x`` holds NaN or infinity; needless where sums of what was masked are finite."""
        if all(o.worker in tallies and tallies[o.worker].rows is not None for o in operands):
            return
        try:
            self.check_finite(x, "input")
        except NonFiniteError:
            for operand in operands:
                for tensor in operand.tensors.values():
                    self.engine.links[operand.worker].buffers.release(tensor)
            raise

    def _settled(self, x: Tensor, weights: Sequence[Tensor], keep: bool) -> Residence | None:
        """Where the weights live for this call: None, and here, or on a worker, where they may be taken just now."""
        engine, here = self.engine, self.residence
        # Rows that a scheme adds would have to be taken off ``dW``, which workers keep.
        whole = not keep or self.scheme.rows_sent(x.shape[0]) == x.shape[0]
        if here is not None and here.holds(weights) and here.dtype == x.dtype and whole and not here.due:
            return here
        for residence in {here, *map(residence_of, weights)}:
            if residence is not None:
                residence.recall()
        if not keep or self.trusted_updates or not isinstance(self.kind, Linear) or not whole:
            return None
        masked = self.problem(x.dtype).wire_dtype
        travels = answer_dtype(engine.settings.wire_dtype, masked)
        same = {x.dtype, masked, travels, *(w.dtype for w in weights)} == {x.dtype}
        terms = engine.terms(weights) if same else None
        if terms is None or not self._pays(terms, x, weights):
            return None
        target = engine.home(sum(w.numel() for w in weights))  # one worker: dW sums over all rows
        self.residence = Residence(self, weights, terms, target)
        return self.residence

    def _pays(self, terms: Terms, x: Tensor, weights: Sequence[Tensor]) -> bool:
        """Whether fewer bytes travel if a worker updates the weight, where the settings ask for that."""
        engine = self.engine
        if engine.settings.update != "auto":
            return True
        shape_w = (sum(w.shape[0] for w in weights), *weights[0].shape[1:])
        work = flops(self.kind, tuple(x.shape), shape_w)
        workers = len(engine.targets(self.number, x.shape[0], work, self.scheme.traits.operators))
        return update_cost(x.shape[0], engine.settings.rekey_rows, len(states(terms.rule(0))), workers).saved > 0

    def _store(
        self, weights: Sequence[Tensor], sources: Sequence[Tensor], targets: Sequence[Target], again: bool
    ) -> StoredWeight:
        """The weight on the workers: the one that is there while it holds, else freshly masked."""
        engine, stored = self.engine, self._stored
        lasting, public = not self.scheme.traits.fresh_every_call, self.scheme.traits.public_weights
        look = engine.public.fingerprint if public else Fingerprint  # `Site.secret` has just looked at public ones
        fingerprint = [look(w) for w in sources] if lasting else []
        if (
            lasting
            and stored is not None
            and stored.dtype == weights[0].dtype
            and fingerprint == self._fingerprint
            and (public or stored.rows_served < engine.settings.rekey_rows)
            and (public or stored.banned == len(engine.crew.banned))  # what a liar held is not used again
            and {target.worker for target in targets} <= set(stored.workers)
        ):
            return stored
        self._stored = None  # lets go of the old masks even if what follows fails
        w = _whole(sources if public else weights)  # integers are made of a public one as everyone has it
        if public and not all(engine.public.holds(source) for source in sources):
            raise UnsafeError(
                f"layer {self.name!r}: its weight is not the one that was protected as public; it was not sent"
            )
        as_it_is = all(one is source for one, source in zip(weights, sources, strict=True))
        if not (as_it_is and fingerprint and all(one.finite for one in fingerprint)):
            self.check_finite(w, "weight")
        begun: dict[int, tuple[WeightCheck, Tally]] = {}
        encoded = self.scheme.encode_weight(
            self.problem(w.dtype),
            w,
            engine.keys.fresh(self.number, "w"),
            targets,
            engine.empty,
            partial(engine.verifier.tally_of_weight, self, begun),
        )
        engine.stats.encryptions["w"] += 1
        if not again:
            engine.stats.elements["w"] += w.numel()
            engine.weights_changed()
        stored = StoredWeight(
            self,
            encoded,
            targets,
            weights[0].dtype,
            {} if self.scheme.traits.exact else engine.verifier.weights(self, encoded.operands, begun),
            public=[source.shape[0] for source in sources] if public else (),
            sendable=not public or all(map(engine.public.may_be_sent, sources)),
        )
        if engine.truth is not None:
            for posted in stored.posted:
                engine.truth.record(posted, "store", {"w": w})
        if lasting:
            self._stored, self._fingerprint = stored, fingerprint
        return stored

    def check_finite(self, tensor: Tensor, what: str) -> None:
        """Raise `NonFiniteError` if ``tensor`` holds NaN or infinity."""
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

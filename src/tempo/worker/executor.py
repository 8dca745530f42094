"""Turns jobs into answers: looks up what is stored, checks shapes, computes, records, sends."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import final

import torch
from torch import Tensor

from tempo.wire.blocks import unpack
from tempo.wire.channel import Channel
from tempo.wire.messages import (
    Backward,
    Failure,
    FailureCode,
    Fetch,
    Forget,
    Forward,
    Probe,
    Product,
    Request,
    Residues,
    Result,
    Seek,
    Shape,
    Store,
    TensorRef,
    ToWorker,
    Update,
)
from tempo.wire.residues import SEED_BYTES
from tempo.wire.shared import MappedSegments
from tempo.wire.tensors import DTYPES, PACKED, raw, size_of
from tempo.worker.base import Base
from tempo.worker.budget import Account
from tempo.worker.compute import Compute, Incoming, output_shape
from tempo.worker.device import Mark
from tempo.worker.jobs import Job
from tempo.worker.outbox import Outbox
from tempo.worker.refusal import Refusal
from tempo.worker.store import PARTS, Numbers
from tempo.worker.transcript import Transcript
from tempo.worker.update import check

Write = Callable[[Tensor], None]

log = logging.getLogger("tempo.worker")


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """What a request comes to.

    Attributes:
        tensors: The operands as they are kept, for the transcript.
        answers: For each answer in order, what writes it.
        change: What is done to a stored weight, after the answers were computed and before any of them is sent: then
            the other side may reuse the memory in which the operands lie.
    """

    tensors: dict[str, Tensor]
    answers: list[tuple[TensorRef, Write]] = field(default_factory=list)
    change: Callable[[], None] | None = None


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, where it is sent from (``out``) and where it is computed (``room``)."""

    ref: TensorRef
    out: Tensor
    room: Tensor


@final
class Executor:
    """Serves the jobs of one session, in order, on one thread; answers may leave on another."""

    def __init__(
        self,
        channel: Channel[ToWorker],
        segments: MappedSegments | None,
        compute: Compute,
        account: Account,
        transcript: Transcript | None,
        base: Base,
    ) -> None:
        self._segments, self._base = segments, base
        self._channel, self._compute, self._account, self._transcript = channel, compute, account, transcript
        self._numbers = Numbers(compute, account)
        self._outbox = Outbox(compute.device.queues, channel.stream.shutdown)
        self._delivered = 0

    def close(self) -> None:
        """Wait for answers on their way."""
        self._outbox.close()

    def serve(self, job: Job) -> None:
        """Do what ``job`` asks, and answer it. Raises OSError when the connection is gone."""
        message = job.message
        if isinstance(message, Forget):
            self._numbers.forget(message.weights, message.operands, message.gradients)
            return
        try:
            if job.refusal is not None:
                raise job.refusal
            self._answer(message, job.incoming)
        except OSError:
            raise
        except Exception as error:
            if isinstance(message, Forward) and message.operand:
                self._numbers.forget(operands=[message.operand])
            self._outbox.put(partial(self._explain, message, error))
        finally:
            for incoming in job.incoming.values():
                if incoming.block is not None:
                    self._account.pool.give(incoming.block)

    def _answer(self, message: Request, incoming: dict[str, Incoming]) -> None:
        started, device = time.perf_counter_ns(), self._compute.device
        for ref in message.tensors:
            if ref.dtype == PACKED:
                self._unpack(ref, incoming)
        plan = self._plan(message, incoming)
        at_once = self._transcript is None and plan.change is None
        with ExitStack() as blocks:
            answers: list[Answer] = []
            for ref, write in plan.answers:
                out = self._destination(ref, blocks)
                answers.append(Answer(ref, out, device.room(out)))
                write(answers[-1].room)
                if at_once:
                    self._outbox.put(
                        partial(self._deliver, message, started, answers, device.mark(), {}, blocks.pop_all())
                    )
                    started, answers = time.perf_counter_ns(), []
            if plan.change is not None:
                plan.change()
            if answers or not plan.answers:  # once answered, shared memory is the other side's again
                tensors = plan.tensors if self._transcript is not None else {}
                self._outbox.put(
                    partial(self._deliver, message, started, answers, device.mark(), tensors, blocks.pop_all())
                )

    def _deliver(
        self,
        message: Request,
        started: int,
        answers: list[Answer],
        done: Mark,
        tensors: dict[str, Tensor],
        blocks: ExitStack,
    ) -> None:
        """Once all is ``done``: fetch ``answers`` from the device, record them where that is asked for, send them."""
        with blocks:
            try:
                done()
                now = time.perf_counter_ns()
                taken, self._delivered = now - max(started, self._delivered), now
                for answer in answers:
                    self._compute.device.download(answer.room, answer.out)
                if self._transcript is not None and not isinstance(message, Probe | Seek):
                    self._transcript.record(message, tensors | {answer.ref.name: answer.out for answer in answers})
            except Exception as error:
                self._explain(message, error)
                return
            for answer in answers:
                payload = [raw(answer.out)] if answer.ref.segment < 0 else []
                self._channel.send(Result(message.id, taken // len(answers), (answer.ref,)), payload)
            if not answers:
                self._channel.send(Result(message.id, taken, ()), [])

    def _unpack(self, ref: TensorRef, incoming: dict[str, Incoming]) -> None:
        packed = incoming[ref.name]
        block = self._account.pool.take(4 * math.prod(ref.shape))
        incoming[ref.name] = Incoming(block.tensor(ref.shape, torch.float32), block)
        unpack(packed.tensor, incoming[ref.name].tensor)
        if packed.block is not None:
            self._account.pool.give(packed.block)

    def _expand(
        self, message: Forward | Backward, name: str, shapes: list[Shape], incoming: dict[str, Incoming]
    ) -> None:
        """Put the operand ``name`` in the place of its seed."""
        came = incoming["seed"].tensor
        if not isinstance(message.product, Residues) or name in incoming or len(shapes) != 1:
            raise Refusal("bad-request", f"a seed instead of {name!r} is for residues, and one answer")
        if tuple(came.shape) != (SEED_BYTES,) or came.dtype != torch.uint8:
            raise Refusal("bad-request", f"a seed of {list(came.shape)} {came.dtype}, not {SEED_BYTES} bytes")
        block = self._account.pool.take(4 * math.prod(shapes[0]))
        incoming[name] = Incoming(block.tensor(shapes[0], torch.int32), block)
        self._compute.expand(came.numpy().tobytes(), incoming[name].tensor)
        seed = incoming.pop("seed")
        if seed.block is not None:
            self._account.pool.give(seed.block)

    def _destination(self, ref: TensorRef, blocks: ExitStack) -> Tensor:
        if ref.segment >= 0 and self._segments is not None:
            if not self._segments.writable(ref.segment):
                raise Refusal("bad-request", f"answer {ref.name!r} is wanted in segment {ref.segment}, which is sealed")
            return self._segments.tensor(ref)
        block = self._account.answers.take(size_of(ref))
        blocks.callback(self._account.answers.give, block)
        return block.tensor(ref.shape, DTYPES[ref.dtype])

    def _explain(self, message: Request, error: Exception) -> None:
        code: FailureCode
        if isinstance(error, Refusal):
            code, why = error.code, str(error)
        elif isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            torch.cuda.empty_cache()
            code, why = "out-of-memory", f"device {self._compute.description} is out of memory"
        else:
            full = "allocate memory" in str(error)
            code, why = "out-of-memory" if full else "failed", str(error).partition("\n")[0][:500]
        # Asking for a weight that may be known is how every session begins.
        level = logging.DEBUG if code == "unknown-digest" else logging.WARNING
        log.log(level, "request %d refused (%s): %s", message.id, code, why)
        self._channel.send(Failure(message.id, code, why))

    # --- one plan for each kind of request: everything is checked before anything is computed ---

    def _plan(self, message: Request, incoming: dict[str, Incoming]) -> Plan:
        match message:
            case Store():
                return self._plan_store(message, incoming)
            case Seek():
                _expect(message, incoming, [], [])
                self._base.find(message.digest)
                return Plan({})
            case Forward():
                return self._plan_forward(message, incoming)
            case Backward():
                return self._plan_backward(message, incoming)
            case Update():
                return self._plan_update(message, incoming)
            case Fetch():
                return self._plan_fetch(message, incoming)
            case Probe():
                return self._plan_probe(message, incoming)

    def _plan_store(self, message: Store, incoming: dict[str, Incoming]) -> Plan:
        if message.digests:
            _expect(message, incoming, [], [])
            return Plan(
                self._numbers.put_weight(message.weight, {"w": self._base.take(message.digests, self._account.pool)})
            )
        _expect(message, incoming, [name for name in PARTS if name == "w" or name in incoming], [])
        w = incoming["w"].tensor
        for name, arrived in incoming.items():
            if arrived.tensor.shape != w.shape or arrived.tensor.dtype != w.dtype:
                found = f"{list(arrived.tensor.shape)} of {arrived.tensor.dtype}"
                raise Refusal("bad-request", f"{name!r} is {found}, its weight {list(w.shape)} of {w.dtype}")
        return Plan(self._numbers.put_weight(message.weight, incoming))

    def _plan_forward(self, message: Forward, incoming: dict[str, Incoming]) -> Plan:
        w = self._numbers.weight(message.weight)
        if "seed" in incoming:
            self._expand(message, "x", [(ref.shape[0], w.shape[1]) for ref in message.wants if ref.shape], incoming)
        _expect(message, incoming, ["x"], ["y"])
        x = incoming["x"].tensor
        _expect_numbers(message.product, x, w, message.wants)
        shape = output_shape(message.product, tuple(x.shape), tuple(w.shape))
        for ref in message.wants:
            _expect_shape(ref.name, ref.shape, shape)
        if message.operand:
            x = self._numbers.put_operand(message.operand, incoming.pop("x"))
        return Plan({"x": x}, [(ref, partial(self._compute.forward, message.product, x, w)) for ref in message.wants])

    def _plan_backward(self, message: Backward, incoming: dict[str, Incoming]) -> Plan:
        if "seed" in incoming:
            outputs = len(self._numbers.weight(message.weight))
            self._expand(message, "g", [(ref.shape[0], outputs) for ref in message.wants if ref.shape], incoming)
        one_way = message.accumulate or isinstance(message.product, Residues)
        _expect(message, incoming, ["g"], ["dx"] if one_way else ["dx", "dw"])
        if message.wants and one_way:
            _expect_numbers(message.product, incoming["g"].tensor, self._numbers.weight(message.weight), message.wants)
        g = self._compute.device.upload(incoming["g"].tensor)
        plan = Plan({"g": g}, change=self._accumulation(message, g) if message.accumulate else None)
        for ref in message.wants:
            if ref.name == "dx":
                w = self._numbers.weight(message.weight)
                shape = output_shape(message.product, ref.shape, tuple(w.shape))
                plan.answers.append((ref, partial(self._compute.input_gradient, message.product, g, w)))
            else:
                x = self._numbers.operand(message.operand)
                shape = output_shape(message.product, tuple(x.shape), ref.shape)
                plan.answers.append((ref, partial(self._compute.weight_gradient, message.product, g, x)))
            _expect_shape(ref.name, tuple(g.shape), shape)
        return plan

    def _accumulation(self, message: Backward, g: Tensor) -> Callable[[], None]:
        w, x = self._numbers.weight(message.weight), self._numbers.operand(message.operand)
        _expect_shape("gradient", tuple(g.shape), output_shape(message.product, tuple(x.shape), tuple(w.shape)))
        if not all(tensor.is_floating_point() for tensor in (w, x, g)):
            raise Refusal("bad-request", f"a gradient of {w.dtype} from {x.dtype} and {g.dtype}: floats are needed")
        return partial(self._numbers.accumulate, message.weight, message.product, g, x)

    def _plan_update(self, message: Update, incoming: dict[str, Incoming]) -> Plan:
        _expect(message, incoming, [], [])
        w = self._numbers.weight(message.weight)
        self._numbers.weight(message.weight, "gradient")
        try:
            check(message.rule, w)
        except ValueError as error:
            raise Refusal("bad-request", str(error)) from None
        if not math.isfinite(message.scale):
            raise Refusal("bad-request", f"the gradient times {message.scale}")
        return Plan({"w": w}, change=partial(self._numbers.update, message.weight, message.rule, message.scale))

    def _plan_fetch(self, message: Fetch, incoming: dict[str, Incoming]) -> Plan:
        _expect(message, incoming, [], [*PARTS, "norm"])
        self._numbers.weight(message.weight)
        plan = Plan({})
        for ref in message.wants:
            kept = self._numbers.weight(message.weight, "gradient" if ref.name == "norm" else ref.name)
            shape, dtype = ((1,), torch.float64) if ref.name == "norm" else (tuple(kept.shape), kept.dtype)
            if ref.shape != shape or DTYPES[ref.dtype] != dtype:
                what = f"{ref.name!r} is {list(shape)} of {dtype}"
                raise Refusal("bad-request", f"{what}, not {list(ref.shape)} of {ref.dtype}")
            plan.answers.append((ref, partial(self._compute.norm if ref.name == "norm" else self._compute.fetch, kept)))
        return plan

    def _plan_probe(self, message: Probe, incoming: dict[str, Incoming]) -> Plan:
        for name in list(incoming):  # read it all, as a product would
            self._compute.keep(incoming.pop(name), self._account).free()
        scratch = 3 * 4 * message.size**2
        self._account.reserve(scratch)
        try:
            self._compute.probe(message.size)
        finally:
            self._account.release(scratch)
        return Plan({}, [(ref, self._compute.fill) for ref in message.wants])


def _expect(message: Request, incoming: dict[str, Incoming], tensors: list[str], wants: list[str]) -> None:
    """Exactly these tensors, and no wants but these."""
    if sorted(incoming) != sorted(tensors) or any(ref.name not in wants for ref in message.wants):
        raise Refusal("bad-request", f"a {type(message).__name__} takes {tensors} and answers {wants}")


def _expect_numbers(product: Product, operand: Tensor, w: Tensor, wants: tuple[TensorRef, ...]) -> None:
    """Residues times small integers are residues."""
    if not isinstance(product, Residues):
        return
    found = [operand.dtype, *(DTYPES[ref.dtype] for ref in wants)]
    if set(found) != {torch.int32} or w.dtype not in (torch.int8, torch.int16):
        raise Refusal("bad-request", f"residues as {found}, their weight as {w.dtype}")


def _expect_shape(name: str, actual: Shape, expected: Shape) -> None:
    if actual != expected:
        raise Refusal("bad-request", f"{name!r} wanted, but the shapes give y{list(expected)}, not {list(actual)}")

"""Turns jobs into answers: looks up what is stored, checks shapes, computes, records, sends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import final

import torch
from torch import Tensor

from tempo.wire.channel import Channel
from tempo.wire.messages import (
    Backward,
    Failure,
    FailureCode,
    Forget,
    Forward,
    Probe,
    Request,
    Result,
    Shape,
    Store,
    TensorRef,
    ToWorker,
)
from tempo.wire.shared import MappedSegments
from tempo.wire.tensors import DTYPES, raw, size_of
from tempo.worker.budget import Account
from tempo.worker.compute import Compute, Incoming, output_shape
from tempo.worker.jobs import Job
from tempo.worker.refusal import Refusal
from tempo.worker.store import Numbers
from tempo.worker.transcript import Transcript

Write = Callable[[Tensor], None]
Plan = tuple[dict[str, Tensor], list[tuple[TensorRef, Write]]]
"""The operands as they are kept, and for each answer in order what writes it."""

log = logging.getLogger("tempo.worker")


@final
class Executor:
    """Serves the jobs of one session, in order, on one thread."""

    def __init__(
        self,
        channel: Channel[ToWorker],
        segments: MappedSegments | None,
        compute: Compute,
        account: Account,
        transcript: Transcript | None,
    ) -> None:
        self._segments = segments
        self._channel, self._compute, self._account, self._transcript = channel, compute, account, transcript
        self._numbers = Numbers(compute, account)

    def serve(self, job: Job) -> None:
        """Do what ``job`` asks, and answer it. Raises OSError when the connection is gone."""
        message = job.message
        if isinstance(message, Forget):
            self._numbers.forget(message.weights, message.operands)
            return
        try:
            if job.refusal is not None:
                raise job.refusal
            self._answer(message, job.incoming)
        except Refusal as refusal:
            self._refuse(message, refusal.code, str(refusal))
        except (torch.OutOfMemoryError, MemoryError):
            torch.cuda.empty_cache()
            self._refuse(message, "out-of-memory", f"device {self._compute.description} is out of memory")
        except OSError:
            raise
        except Exception as error:
            full = "allocate memory" in str(error)
            self._refuse(message, "out-of-memory" if full else "failed", str(error).partition("\n")[0][:500])
        finally:
            for incoming in job.incoming.values():
                if incoming.block is not None:
                    self._account.pool.give(incoming.block)

    def _answer(self, message: Request, incoming: dict[str, Incoming]) -> None:
        started = time.perf_counter_ns()
        tensors, answers = self._plan(message, incoming)
        held: list[tuple[Result, list[memoryview]]] = []
        with ExitStack() as blocks:
            for ref, write in answers:
                out = self._destination(ref, blocks)
                write(out)
                tensors[ref.name] = out
                result = Result(message.id, time.perf_counter_ns() - started, (ref,))
                payload = [raw(out)] if ref.segment < 0 else []
                if self._transcript is None:
                    self._channel.send(result, payload)
                else:
                    held.append((result, payload))  # once answered, shared memory is the other side's again
                started = time.perf_counter_ns()
            if not answers:
                held.append((Result(message.id, time.perf_counter_ns() - started, ()), []))
            if self._transcript is not None and not isinstance(message, Probe):
                self._transcript.record(message, tensors)
            for result, payload in held:
                self._channel.send(result, payload)

    def _destination(self, ref: TensorRef, blocks: ExitStack) -> Tensor:
        if ref.segment >= 0 and self._segments is not None:
            if not self._segments.writable(ref.segment):
                raise Refusal("bad-request", f"answer {ref.name!r} is wanted in segment {ref.segment}, which is sealed")
            return self._segments.tensor(ref)
        block = self._account.answers.take(size_of(ref))
        blocks.callback(self._account.answers.give, block)
        return block.tensor(ref.shape, DTYPES[ref.dtype])

    def _refuse(self, message: Request, code: FailureCode, why: str) -> None:
        if isinstance(message, Forward) and message.operand:
            self._numbers.forget((), (message.operand,))
        log.warning("request %d refused (%s): %s", message.id, code, why)
        self._channel.send(Failure(message.id, code, why))

    # --- one plan for each kind of request: everything is checked before anything is computed ---

    def _plan(self, message: Request, incoming: dict[str, Incoming]) -> Plan:
        match message:
            case Store():
                _expect(message, incoming, ["w"], [])
                return {"w": self._numbers.put_weight(message.weight, incoming.pop("w"))}, []
            case Forward():
                return self._plan_forward(message, incoming)
            case Backward():
                return self._plan_backward(message, incoming)
            case Probe():
                return self._plan_probe(message, incoming)

    def _plan_forward(self, message: Forward, incoming: dict[str, Incoming]) -> Plan:
        _expect(message, incoming, ["x"], ["y"])
        w, x = self._numbers.weight(message.weight), incoming["x"].tensor
        shape = output_shape(message.product, tuple(x.shape), tuple(w.shape))
        for ref in message.wants:
            _expect_shape(ref, ref.shape, shape)
        if message.operand:
            x = self._numbers.put_operand(message.operand, incoming.pop("x"))
        return {"x": x}, [(ref, partial(self._compute.forward, message.product, x, w)) for ref in message.wants]

    def _plan_backward(self, message: Backward, incoming: dict[str, Incoming]) -> Plan:
        _expect(message, incoming, ["g"], ["dx", "dw"])
        g = incoming["g"].tensor
        answers: list[tuple[TensorRef, Write]] = []
        for ref in message.wants:
            if ref.name == "dx":
                w = self._numbers.weight(message.weight)
                shape = output_shape(message.product, ref.shape, tuple(w.shape))
                answers.append((ref, partial(self._compute.input_gradient, message.product, g, w)))
            else:
                x = self._numbers.operand(message.operand)
                shape = output_shape(message.product, tuple(x.shape), ref.shape)
                answers.append((ref, partial(self._compute.weight_gradient, message.product, g, x)))
            _expect_shape(ref, tuple(g.shape), shape)
        return {"g": g}, answers

    def _plan_probe(self, message: Probe, incoming: dict[str, Incoming]) -> Plan:
        for name in list(incoming):  # read it all, as a product would
            self._compute.keep(incoming.pop(name), self._account).free()
        scratch = 3 * 4 * message.size**2
        self._account.reserve(scratch)
        try:
            self._compute.probe(message.size)
        finally:
            self._account.release(scratch)
        return {}, [(ref, self._compute.fill) for ref in message.wants]


def _expect(message: Request, incoming: dict[str, Incoming], tensors: list[str], wants: list[str]) -> None:
    """Exactly these tensors, and no wants but these."""
    if sorted(incoming) != tensors or any(ref.name not in wants for ref in message.wants):
        raise Refusal("bad-request", f"a {type(message).__name__} takes {tensors} and answers {wants}")


def _expect_shape(ref: TensorRef, actual: Shape, expected: Shape) -> None:
    if actual != expected:
        raise Refusal("bad-request", f"{ref.name!r} wanted, but the shapes give y{list(expected)}, not {list(actual)}")

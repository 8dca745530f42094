"""Requests for one product in flight at several workers at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch

from tempo.engine.reply import Received
from tempo.errors import WorkerError, WorkerLacksWeightError, WorkerLostError
from tempo.schemes.base import Operand
from tempo.schemes.reply import Reply
from tempo.verify.checks import AnswerCheck
from tempo.wire.layout import meant, sent, sent_shape
from tempo.wire.messages import Backward, Fetch, Forward, Store, Update
from tempo.wire.messages import Product as ProductKind

if TYPE_CHECKING:
    from tempo.engine.engine import Engine

Wants = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class Posted:
    """Where and when a request went, as the worker's transcript will name it."""

    worker: int
    step: int
    sequence: int
    layer: int


class Batch:
    """One request to each worker that takes part in a product, and their answers."""

    def __init__(self, engine: Engine, name: str, layer: int, kind: ProductKind) -> None:
        self.engine = engine
        self.name = name
        self.layer = layer
        self.kind = kind
        self.posted: dict[int, Posted] = {}
        self._checks: dict[tuple[str, int], AnswerCheck] = {}
        self._failed: dict[str, WorkerError] = {}
        self._futures: dict[str, dict[int, Future[Any]]] = {}
        # A gradient may never be asked for; its buffer is then given back with the next batch.
        engine.give_back_after(self, self._futures)

    def post(
        self,
        send: Operand,
        message: type[Store | Forward | Backward | Update | Fetch],
        wants: Wants,
        checks: Mapping[str, AnswerCheck] | None = None,
        **fields: Any,
    ) -> None:
        """Send ``message`` with the tensors of ``send`` to its worker; its answers, ``wants``, must pass ``checks``."""
        engine, worker = self.engine, send.worker
        link, trace = engine.links[worker], engine.stats.trace
        with engine.stats.timed("wire", message.__name__, self.name), Named(engine, self.name, worker):
            exchange = None if trace is None else trace.request(str(link.address), message.__name__, self.name)
            request = message(step=engine.step, layer=self.layer, **fields)
            futures = link.request(
                request,
                {name: sent(self.kind, name, tensor) for name, tensor in send.tensors.items()},
                {name: (sent_shape(self.kind, name, shape), dtype) for name, (shape, dtype) in wants.items()},
                exchange,
            )
        self.posted[worker] = Posted(worker, engine.step, link.last_id, self.layer)
        for name, future in futures.items():
            self._futures.setdefault(name, {})[worker] = future
        for name, check in (checks or {}).items():
            self._checks[name, worker] = check

    def acknowledged(self) -> list[int]:
        """Await the workers' acknowledgements of what needs no other answer.

        Returns:
            Workers that lack the weight that they were asked for by its digests.
        """
        engine, lacking = self.engine, []
        for worker, future in self._futures.pop("", {}).items():
            with engine.stats.timed("wire", "acknowledgement", self.name), Named(engine, self.name, worker):
                try:
                    future.result(timeout=engine.settings.request_timeout)
                except WorkerLacksWeightError:
                    lacking.append(worker)
        return lacking

    def arrived(self, name: str) -> bool:
        """Whether all answers called ``name`` are there, or will never be."""
        return all(future.done() for future in self._futures[name].values())

    @contextmanager
    def replies(self, name: str) -> Iterator[dict[int, Reply]]:
        """The workers' answers called ``name``, to be decoded inside the context; their buffers are reused after it.

        Raises:
            WorkerError: A worker failed, did not answer in time, or answered something else than the product, which
                shows when it is decoded; names the layer and the worker.
        """
        engine = self.engine
        if name in self._failed:
            raise self._failed[name].bare()
        received: dict[int, Received] = {}
        try:
            self._receive(name, received)
            with engine.stats.timed("mask", name, self.name):
                yield dict(received)
            engine.stats.decryptions[name if name in engine.stats.decryptions else "w"] += 1
        except WorkerError as error:
            self._failed[name] = error.bare()
            raise
        finally:
            for reply in received.values():
                reply.release()

    def _receive(self, name: str, received: dict[int, Received]) -> None:
        """Await the answers called ``name``; ``received`` has those that came, even if a later one does not."""
        engine, futures = self.engine, self._futures[name]
        waited, trace = 0, engine.stats.trace
        before = {worker: engine.links[worker].worker_nanoseconds for worker in futures}
        for worker in list(futures):
            named = Named(engine, self.name, worker)
            with named:
                start = time.perf_counter_ns()
                # Out of the batch whatever comes: what is left in it when something fails is given back with it.
                with nullcontext() if trace is None else trace.span("wait", name, self.name):
                    answer = futures.pop(worker).result(timeout=engine.settings.request_timeout)
                waited += time.perf_counter_ns() - start
                tensor = meant(self.kind, name, answer)
            check = self._checks.pop((name, worker), None)
            received[worker] = Received(engine, worker, name, self.name, tensor, check, named)
        computing = max(engine.links[worker].worker_nanoseconds - earlier for worker, earlier in before.items())
        engine.stats.seconds["worker"] += min(waited, computing) / 1e9
        engine.stats.seconds["wire"] += max(0, waited - computing) / 1e9


@final
class Named:
    """Adds a layer's name to whatever goes wrong inside, at one of its workers."""

    __slots__ = ("_engine", "_layer", "_worker")

    def __init__(self, engine: Engine, layer: str, worker: int) -> None:
        self._engine, self._layer, self._worker = engine, layer, worker

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FutureTimeoutError):
            lost = WorkerLostError(
                f"layer {self._layer!r}: worker {self._engine.links[self._worker].address} did not answer within "
                f"{self._engine.settings.request_timeout:g} s (setting request_timeout)"
            )
            lost.worker = self._worker
            raise lost from None
        if isinstance(error, WorkerError):
            named = type(error)(f"layer {self._layer!r}: {error}")
            named.worker = self._worker
            raise named from error

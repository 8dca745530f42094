"""Requests for one product in flight at several workers at once."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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

T = TypeVar("T")

Wants = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Posted(NamedTuple):
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
        self._futures: defaultdict[str, dict[int, Future[Any]]] = defaultdict(dict)

    def __del__(self) -> None:
        # A gradient may never be asked for; its buffer is then given back with the next batch.
        for futures in self._futures.values():
            if futures:
                self.engine.unread.extend(futures.items())

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
        with engine.stats.timed("wire", message.__name__, self.name):
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
            self._futures[name][worker] = future
        if checks is not None:
            self._checks.update({(name, worker): check for name, check in checks.items()})

    def acknowledged(self) -> list[int]:
        """Await the workers' acknowledgements of what needs no other answer.

        Returns:
            Workers that lack the weight that they were asked for by its digests.
        """
        lacking = []
        for worker, future in self._futures.pop("", {}).items():
            with self.engine.stats.timed("wire", "acknowledgement", self.name):
                try:
                    self._result(worker, future)
                except WorkerLacksWeightError:
                    lacking.append(worker)
        return lacking

    def arrived(self, name: str) -> bool:
        """Whether all answers called ``name`` are there, or will never be."""
        return all(future.done() for future in self._futures[name].values())

    def decoded(self, name: str, decode: Callable[[dict[int, Reply]], T]) -> T:
        """What ``decode`` makes of the workers' answers called ``name``, whose buffers are then used again.

        Raises:
            WorkerError: A worker failed, did not answer in time, or answered something else than the product, which
                shows when it is decoded; names the layer and the worker.
        """
        stats = self.engine.stats
        if name in self._failed:
            raise self._failed[name].bare()
        received: dict[int, Received] = {}
        try:
            self._receive(name, received)
            with stats.timed("mask", name, self.name):
                found = decode(dict(received))
            stats.decryptions[name if name in stats.decryptions else "w"] += 1
            return found
        except WorkerError as error:
            self._failed[name] = error.bare()
            raise
        finally:
            for reply in received.values():
                reply.release()

    def _receive(self, name: str, received: dict[int, Received]) -> None:
        """Await the answers called ``name``; ``received`` has those that came, even if a later one does not."""
        engine, stats, futures = self.engine, self.engine.stats, self._futures[name]
        before = [(engine.links[worker], engine.links[worker].worker_nanoseconds) for worker in futures]
        waited = 0
        for worker in list(futures):
            start = time.perf_counter_ns()
            # Out of the batch whatever comes: what is left in it when something fails is given back with it.
            with nullcontext() if stats.trace is None else stats.trace.span("wait", name, self.name):
                answer = self._result(worker, futures.pop(worker))
            waited += time.perf_counter_ns() - start
            check = self._checks.pop((name, worker), None)
            received[worker] = Received(engine, worker, name, self.name, meant(self.kind, name, answer), check)
        computing = max(link.worker_nanoseconds - earlier for link, earlier in before)
        stats.seconds["worker"] += min(waited, computing) / 1e9
        stats.seconds["wire"] += max(0, waited - computing) / 1e9

    def _result(self, worker: int, future: Future[Any]) -> Any:
        """What a worker answered; else the error, which names the layer."""
        timeout = self.engine.settings.request_timeout
        try:
            return future.result(timeout)
        except WorkerError as error:
            raise error.named(self.name, worker) from error
        except TimeoutError:
            address = self.engine.links[worker].address
            late = f"worker {address} did not answer within {timeout:g} s (setting request_timeout)"
            raise WorkerLostError(late).named(self.name, worker) from None

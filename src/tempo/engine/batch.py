"""Requests for one product in flight at several workers at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tempo.errors import WorkerError, WorkerLostError
from tempo.schemes.base import Operand
from tempo.verify.checks import Residual
from tempo.wire.messages import Backward, Fetch, Forward, Store, Update

if TYPE_CHECKING:
    from tempo.engine.engine import Engine

Check = Callable[[Tensor, Tensor | None], Residual]
"""Judges an answer, and copies it in the same pass if there is somewhere to."""
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

    def __init__(self, engine: Engine, name: str, layer: int) -> None:
        self.engine = engine
        self.name = name
        self.layer = layer
        self.posted: dict[int, Posted] = {}
        self._checks: dict[tuple[str, int], Check] = {}
        self._failed: dict[str, WorkerError] = {}
        self._futures: dict[str, dict[int, Future[Any]]] = {}
        # A gradient may never be asked for; its buffer is then given back with the next batch.
        engine.give_back_after(self, self._futures)

    def post(
        self,
        send: Operand,
        message: type[Store | Forward | Backward | Update | Fetch],
        wants: Wants,
        checks: Mapping[str, Check] | None = None,
        **fields: Any,
    ) -> None:
        """Send ``message`` with the tensors of ``send`` to its worker; its answers, ``wants``, must pass ``checks``."""
        engine, worker = self.engine, send.worker
        link, start = engine.links[worker], time.perf_counter()
        with self._named(worker):
            request = message(step=engine.step, layer=self.layer, **fields)
            futures = link.request(request, send.tensors, wants)
        engine.stats.seconds["wire"] += time.perf_counter() - start
        self.posted[worker] = Posted(worker, engine.step, link.last_id, self.layer)
        for name, future in futures.items():
            self._futures.setdefault(name, {})[worker] = future
        for name, check in (checks or {}).items():
            self._checks[name, worker] = check

    def acknowledged(self) -> None:
        """Await the workers' acknowledgements of what needs no other answer."""
        for worker, future in self._futures.pop("", {}).items():
            with self._named(worker):
                future.result(timeout=self.engine.settings.request_timeout)

    def arrived(self, name: str) -> bool:
        """Whether all answers called ``name`` are there, or will never be."""
        return all(future.done() for future in self._futures[name].values())

    @contextmanager
    def replies(self, name: str) -> Iterator[dict[int, Tensor]]:
        """The workers' answers called ``name``, to be decoded inside the context; their buffers are reused after it.

        Raises:
            WorkerError: A worker failed, did not answer in time, or answered something else than the product; names
                the layer and the worker.
        """
        engine = self.engine
        if name in self._failed:
            raise self._failed[name].bare()
        replies: dict[int, Tensor] = {}
        try:
            self._receive(name, replies)
            with engine.stats.timed("mask"):
                yield replies
            engine.stats.decryptions[name if name in engine.stats.decryptions else "w"] += 1
        except WorkerError as error:
            self._failed[name] = error.bare()
            raise
        finally:
            for worker, tensor in replies.items():
                engine.links[worker].release(tensor)

    def _receive(self, name: str, replies: dict[int, Tensor]) -> None:
        """Await and check the answers called ``name``; ``replies`` has what was received, even if a later one fails."""
        engine, futures = self.engine, self._futures[name]
        start, checking = time.perf_counter(), engine.stats.seconds["verify"]
        before = {worker: engine.links[worker].worker_nanoseconds for worker in futures}
        for worker in list(futures):
            with self._named(worker):
                # Out of the batch whatever comes: what is left in it when something fails is given back with it.
                replies[worker] = futures.pop(worker).result(timeout=engine.settings.request_timeout)
                self._check(name, worker, replies)
        waited = time.perf_counter() - start - (engine.stats.seconds["verify"] - checking)
        computing = (
            max(engine.links[worker].worker_nanoseconds - nanoseconds for worker, nanoseconds in before.items()) / 1e9
        )
        engine.stats.seconds["worker"] += min(waited, computing)
        engine.stats.seconds["wire"] += max(0.0, waited - computing)

    def _check(self, name: str, worker: int, replies: dict[int, Tensor]) -> None:
        engine, check = self.engine, self._checks.pop((name, worker), None)
        if check is None:
            return
        link = engine.links[worker]
        with engine.stats.timed("verify"):
            reply, into = replies[worker], link.private(replies[worker])
            try:
                residual = check(reply, into)
            finally:
                if into is not None:  # a worker can write to shared memory at any time: what was judged is used
                    replies[worker] = into
                    link.release(reply)
        engine.verifier.judge(str(link.address), engine.step, name, replies[worker], residual)

    @contextmanager
    def _named(self, worker: int) -> Iterator[None]:
        """Add the layer's name to whatever goes wrong at a worker."""
        try:
            yield
        except FutureTimeoutError:
            lost = WorkerLostError(
                f"layer {self.name!r}: worker {self.engine.links[worker].address} did not answer within "
                f"{self.engine.settings.request_timeout:g} s (setting request_timeout)"
            )
            lost.worker = worker
            raise lost from None
        except WorkerError as error:
            named = type(error)(f"layer {self.name!r}: {error}")
            named.worker = worker
            raise named from error

"""The trusted side's engine: links to workers, keys, counts, and the bookkeeping that all products share."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tempo.engine.batch import Batch
from tempo.engine.crew import Crew
from tempo.engine.link import ACKNOWLEDGED, Link
from tempo.engine.placement import Planner
from tempo.engine.public import PublicWeights
from tempo.engine.recall import Recall
from tempo.engine.sharing import InputSharing
from tempo.engine.stats import Stats
from tempo.engine.truth import TruthRecorder
from tempo.engine.verifier import Verifier
from tempo.errors import SessionClosedError, WorkerError, WorkerLacksWeightError
from tempo.keys import KeySchedule
from tempo.schemes.base import Scheme, Target
from tempo.settings import Settings
from tempo.wire.messages import Seek

if TYPE_CHECKING:
    from tempo.engine.call import WeightGradients
    from tempo.engine.product import Product
    from tempo.engine.residence import Residence, Terms


class Engine:
    """What the products of one session share.

    Args:
        settings: The session's settings.
        scheme: The scheme that the settings name; sites may use another.
        links: One per worker; their order is the workers' numbering.
        truth: Records plain operands, if the user asked for that insecure thing.
        recall: Seeks workers that were lost.
    """

    def __init__(
        self,
        settings: Settings,
        scheme: Scheme,
        links: Sequence[Link],
        truth: TruthRecorder | None = None,
        recall: Recall | None = None,
    ) -> None:
        self.settings = settings
        self.scheme = scheme
        self.keys = KeySchedule()
        self.stats = Stats()
        self.planner = Planner(settings, links)
        self.crew = Crew(links, self.planner.shares, recall, settings.patience)
        self.crew.check(scheme)
        self.links = self.crew.links
        """Connections to all workers that ever took part, by number."""
        self.verifier = Verifier(settings.verify)
        self.sharing = InputSharing()
        self.public = PublicWeights()
        self.step = 0
        self.truth = truth
        self.unread: deque[tuple[int, Future[Any]]] = deque()
        """Answers that nobody will ask for, by worker: finalizers, which must not take locks, add to it."""
        self.terms: Callable[[Sequence[Tensor]], Terms | None] = lambda _: None
        """How workers update weights, or None where this side does; `Session.optimizer` sets it."""
        self.together: Callable[[Sequence[Tensor]], bool] = lambda _: True
        """Whether weights may be one product, for all that is known of their updates."""
        self.residences: set[Residence] = set()
        """Weights that live on workers."""
        self.unsettled: weakref.WeakSet[WeightGradients] = weakref.WeakSet()
        """Weight gradients that workers may still be computing."""
        self._numbers = itertools.count(1)
        self._backward_since_step = False
        self._warned: set[str] = set()
        self._open = True

    # --- numbers and time ---------------------------------------------------------------------------------------

    def new_number(self) -> int:
        """A fresh opaque number, for a layer, a stored weight or a kept operand."""
        return next(self._numbers)

    def weights_changed(self) -> None:
        """Note that a weight is being masked anew: after a backward pass, that begins the next step."""
        if self._backward_since_step:
            self._backward_since_step = False
            self.step += 1

    def backward_seen(self) -> None:
        """Note that a gradient was sent."""
        self._backward_since_step = True

    # --- workers ------------------------------------------------------------------------------------------------

    def targets(self, number: int, rows: int, flops: int, operators: int = 1) -> list[Target]:
        """Which workers take part in a product of so many ``flops``; the rest as for `Crew.targets`."""
        self.check_open()
        return self.crew.targets(number, rows, flops < self.settings.divide_flops, operators)

    def home(self, size: int) -> Target:
        """Which worker a weight of so many elements is to live on: one each, large shares get more."""
        self.check_open()
        held = Counter[int]()
        for residence in self.residences:
            held[residence.target.worker] += residence.size
        everyone = self.crew.targets(0, len(self.links), False)
        return min(everyone, key=lambda target: (held[target.worker] + size) / target.share)

    def dismiss(self, error: WorkerError) -> None:
        """Go on without the worker that ``error`` is about; raises it where nobody is left (see `Crew.dismiss`).

        Raises:
            WeightsLostError: Weights lived there, and were changed since they were last here.
        """
        failure: WorkerError | None = None
        try:
            self.crew.dismiss(error, self.step)
        except WorkerError as raised:
            failure = raised
        present = self.crew.present
        gone = [residence for residence in self.residences if residence.target.worker not in present]
        lost = [loss for residence in gone if (loss := residence.lose(error)) is not None]
        if lost:
            raise lost[0].bare() from error
        if failure is not None:
            raise failure

    def empty(self, worker: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A send buffer of that worker's link."""
        return self.links[worker].buffers.empty(shape, dtype)

    def known(self, digests: Sequence[bytes]) -> list[bool]:
        """Of public integers with these digests, whether every worker that takes part says that it has them.

        Raises:
            WorkerError: One was lost, or did not answer in time.
        """
        links = [self.links[number] for number in self.crew.present]
        asked = [[link.request(Seek(digest=digest), {}, {})[ACKNOWLEDGED] for link in links] for digest in digests]
        return [all(self._has(future) for future in futures) for futures in asked]

    def _has(self, answer: Future[Any]) -> bool:
        try:
            answer.result(self.settings.request_timeout)
        except WorkerLacksWeightError:
            return False
        return True

    def batch(self, product: Product) -> Batch:
        """A batch of requests for one product, one to each worker that takes part."""
        while self.unread:
            worker, future = self.unread.popleft()
            future.add_done_callback(partial(self._release_unread, worker))
        if self.truth is not None:
            self.truth.named(product.number, product.name)
        return Batch(self, product.name, product.number, product.kind)

    def settle(self) -> None:
        """Take the weight gradients that have arrived, so that nothing is kept for their sake any longer."""
        for gradients in [gradients for gradients in self.unsettled if gradients.arrived]:
            self.unsettled.discard(gradients)
            gradients()

    def _release_unread(self, worker: int, future: Future[Any]) -> None:
        if future.exception() is None and future.result() is not None:
            self.links[worker].buffers.release(future.result())

    # --- state --------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise `SessionClosedError` once the session is closed."""
        if not self._open:
            raise SessionClosedError(
                "this session is closed; call session.unprotect(model) to run the model in the trusted process, "
                "or protect it under a new session"
            )

    def warn_once(self, text: str, category: type[Warning] = RuntimeWarning) -> None:
        """Warn the user, once per session and text."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, category, stacklevel=4)

    def warn_if_not_finite(self, name: str, g: Tensor, totals: Tensor) -> None:
        """Warn about a gradient with NaN or infinity. It is passed on, since loss scalers rely on seeing it.

        ``totals`` are its sums, or its rows' lengths: only if these are suspicious, it is looked into.
        """
        if not bool(torch.isfinite(totals).all()) and not bool(torch.isfinite(g).all()):
            self.warn_once(
                f"layer {name!r}: its output gradient holds NaN or infinity; passed on as plain PyTorch does"
            )

    def snapshot(self) -> Stats:
        """The counts so far, with the links' byte counts."""
        stats = self.stats.copy()
        stats.bytes_sent = sum(link.bytes_sent for link in self.links)
        stats.bytes_received = sum(link.bytes_received for link in self.links)
        return stats

    def close(self) -> None:
        """Close all links. Idempotent."""
        self._open = False
        self.crew.close()

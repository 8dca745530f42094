"""A product's weight that lives on a worker: stored once under masks, changed there, fetched when it is needed here.

What was stored is kept here as well, as a journal: while nothing has changed since, losing the worker loses nothing.
A weight is recalled whenever someone needs it here, and when its masks have served as many rows as they may; the next
training call stores it anew, under fresh ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tempo.engine.away import bring_back, put_away, residence_of
from tempo.engine.stored import StoredWeight
from tempo.errors import SchemeError, WeightsLostError, WorkerError
from tempo.schemes.base import Operand, Target, UpdatableWeight
from tempo.verify.checks import AnswerCheck
from tempo.verify.sketch import Sketch
from tempo.wire.messages import Fetch, Rule, Update
from tempo.worker.update import states

if TYPE_CHECKING:
    from tempo.engine.product import Product


class Terms(ABC):
    """By which optimizer, and with which hyper-parameters, the parameters of one product are updated on a worker."""

    linear: bool
    """Whether the optimizer is linear in weights and gradients, so that sketches can follow it."""

    @abstractmethod
    def rule(self, steps: int) -> Rule:
        """The optimizer's next step; ``steps`` were made since `state`."""

    @abstractmethod
    def state(self, parameters: Sequence[nn.Parameter]) -> dict[str, Tensor]:
        """What the optimizer keeps of ``parameters``, one after the other along axis 0."""

    @abstractmethod
    def drop(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let go of `state`: from now on it is elsewhere."""

    @abstractmethod
    def keep(self, parameters: Sequence[nn.Parameter], state: Mapping[str, Tensor], steps: int) -> None:
        """Let the optimizer keep ``state``, ``steps`` after `state` was called; its reverse."""


class Residence:
    """One product's weight on one worker.

    Args:
        product: Whose weight it is.
        weights: Its parameters, of one dtype.
        terms: How they are updated.
        target: The worker.

    Raises:
        NonFiniteError: A weight holds NaN or infinity.
    """

    def __init__(self, product: Product, weights: Sequence[Tensor], terms: Terms, target: Target) -> None:
        engine = product.engine
        self.product, self.terms, self.target = product, terms, target
        self.name = product.name
        self.where = str(engine.links[target.worker].address)
        self.parameters = [w for w in weights if isinstance(w, nn.Parameter)]
        self.sizes = [len(w) for w in weights]
        self.size = sum(w.numel() for w in weights)
        self.dtype = weights[0].dtype
        self.steps = 0
        """Updates since the weight was stored."""
        self.gradient = any(p.grad is not None for p in self.parameters)
        """Whether the worker has a gradient."""
        self._changed = False
        """Whether the worker has anything by now that the journal does not."""
        self.lost: WeightsLostError | None = None
        self.scale = 1.0
        """What the gradient will be multiplied by: clipping decides it."""
        self._ending = ""

        with engine.stats.timed("mask", "w", self.name):
            self._journal = {"w": torch.cat([p.detach() for p in self.parameters]), **terms.state(self.parameters)}
            if self.gradient:
                whole = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
                self._journal["gradient"] = torch.cat(whole)
            self._kept = [name for name in self._journal if name not in ("w", "gradient")]
            encoded = self._encode(self._journal)
        self.encoded = encoded
        tensors = encoded.operands[0].tensors
        self.sketch: Sketch | None = None
        if engine.verifier.policy.share and terms.linear:
            with engine.stats.timed("verify", "w", self.name):
                kept = {name: tensors[name] for name in self._kept}
                key = engine.keys.fresh(product.number, "verify-w")
                self.sketch = Sketch(tensors["w"], key, kept, tensors.get("gradient"))
        checks = {} if self.sketch is None else {target.worker: self.sketch.check}
        self.stored = StoredWeight(product, encoded, [target], self.dtype, checks)
        terms.drop(self.parameters)
        for parameter in self.parameters:
            put_away(parameter, self)
        engine.residences.add(self)

    def _encode(self, plain: Mapping[str, Tensor]) -> UpdatableWeight:
        product = self.product
        engine, worker = product.engine, self.target.worker
        product.check_finite(plain["w"], "weight")
        encoded = product.scheme.encode_weight(
            product.problem(self.dtype), plain["w"], engine.keys.fresh(product.number, "w"), [self.target], engine.empty
        )
        if not isinstance(encoded, UpdatableWeight):
            raise SchemeError(f"scheme {product.scheme.name!r} has no masks that a worker could update a weight under")
        tensors = encoded.operands[0].tensors
        for name, tensor in plain.items():
            if name != "w":
                tensors[name] = engine.empty(worker, tuple(tensor.shape), self.dtype)
                key = engine.keys.fresh(product.number, "kept")
                encoded.encode_kept(name, tensor, key, tensors[name], linear=self.terms.linear)
        engine.stats.encryptions["w"] += len(plain)
        engine.stats.elements["w"] += sum(tensor.numel() for tensor in plain.values())
        return encoded

    # --- while it lives there ---

    @property
    def due(self) -> bool:
        """Whether it has to be recalled before it is used again."""
        return bool(self._ending) or self.stored.rows_served >= self.product.engine.settings.rekey_rows

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether it holds just these parameters."""
        return len(weights) == len(self.parameters) and all(residence_of(w) is self for w in weights)

    def accumulates(self, x: Tensor, g: Tensor) -> None:
        """Note that the worker is about to be sent ``g``, the gradient of a call on ``x``, both plain."""
        self.gradient = self._changed = True
        if self.sketch is not None:
            with self.product.engine.stats.timed("verify", "g", self.name):
                self.sketch.accumulate(x, g, self.encoded.masks)

    def discard(self) -> None:
        """Let the worker forget the gradient."""
        if self.gradient:
            self.gradient, self.scale = False, 1.0
            self._changed = self.steps > 0
            self._journal.pop("gradient", None)
            self.product.engine.links[self.target.worker].forget(gradients=[self.stored.number])
            self.encoded.discard()
            if self.sketch is not None:
                self.sketch.discard()

    def update(self) -> None:
        """Have the worker take one step of the optimizer, if it has a gradient."""
        if not self.gradient:
            return
        if self.lost is not None:
            raise self.lost.bare()
        engine, rule = self.product.engine, self.terms.rule(self.steps)
        batch = engine.batch(self.product)
        batch.post(self._bare, Update, {}, weight=self.stored.number, rule=rule, scale=self.scale)
        self.stored.unconfirmed.append(batch)
        with engine.stats.timed("mask", "g", self.name):
            self.encoded.follow(rule, self.scale)
        if self.sketch is not None:
            with engine.stats.timed("verify", "g", self.name):
                self.sketch.update(rule, self.scale)
        self._kept = list(dict.fromkeys([*self._kept, *states(rule)]))
        self._changed = True
        self.steps += 1
        self.gradient, self.scale = False, 1.0
        for parameter in self.parameters:
            torch.autograd.graph.increment_version(parameter)  # graphs built on what it was refuse to be used
        engine.weights_changed()

    def norm(self) -> float:
        """Length of the gradient on the worker, as the worker says: see `Sketch.plausible`."""
        if not self.encoded.keeps_length("gradient"):  # masks were renewed while it was being accumulated
            gradient = self._fetch(self._wanted("gradient"))["gradient"]
            return float(self.encoded.decode_kept("gradient", gradient).norm()) * self.scale
        norm = float(self._fetch({"norm": ((1,), torch.float64)})["norm"])
        if self.sketch is not None:
            self.product.engine.verifier.judge_norm(self.where, self.product.engine.step, norm, self.sketch)
        return norm * self.scale

    def peek(self) -> Tensor:
        """The weight as it is now: needed here for once, so that its next call will not go out like this."""
        self._ending = "features that are zero in all rows had to be filled"
        with self.product.engine.stats.timed("mask", "w", self.name):
            return self.encoded.decode_kept("w", self._fetch(self._wanted("w"))["w"])

    # --- how it ends ---

    def end(self, reason: str) -> None:
        """Recall it; from now on it is updated here."""
        self.product.trusted_updates = reason
        self.recall()

    def recall(self) -> None:
        """Fetch the weight, its gradient and what the optimizer keeps, and give them back to where PyTorch has them.

        Raises:
            WeightsLostError: The worker is gone, or gave something else.
        """
        if self.product.residence is not self:
            return
        if self.lost is not None:
            raise self.lost.bare()
        if self._ending:
            self.product.trusted_updates = self._ending
        if not self._changed:
            self._restore(self._journal)
            return
        names = ["w", *self._kept, *(["gradient"] if self.gradient else [])]
        try:
            self.stored.confirm()
            fetched = self._fetch(self._wanted(*names))
        except WorkerError as error:
            self.product.engine.dismiss(error)  # raises, unless nothing had changed
            return
        self.product.engine.stats.elements["dw"] += sum(tensor.numel() for tensor in fetched.values())
        with self.product.engine.stats.timed("mask", "w", self.name):
            self._restore({name: self.encoded.decode_kept(name, tensor) for name, tensor in fetched.items()})

    def doubt(self) -> None:
        """Note that the worker may or may not have taken a gradient."""
        self.lost = self._loss("a request that changes it failed half-way")

    def lose(self, error: WorkerError) -> WeightsLostError | None:
        """The worker is gone: go on with the journal, if that is all there was, else say what is lost."""
        if self.product.residence is not self:
            return None
        if self.lost is None and not self._changed:
            self._restore(self._journal)
            return None
        self.lost = self._loss(str(error))
        return self.lost

    def abandon(self) -> None:
        """Give the parameters what they held when they were last here: they are about to be loaded anew."""
        if self.product.residence is self:
            self._restore({name: tensor for name, tensor in self._journal.items() if name != "gradient"})

    # --- parts ---

    @property
    def _bare(self) -> Operand:
        """Nothing, for the worker."""
        return Operand(self.target.worker, {}, slice(0, 0))

    def _wanted(self, *names: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape = self.stored.shapes_w[self.target.worker]
        return dict.fromkeys(names, (shape, self.dtype))

    def _fetch(self, wants: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
        """Have the worker send what it keeps, and check it against the sketches."""
        engine = self.product.engine
        batch = engine.batch(self.product)
        checks = {
            name: AnswerCheck(partial(self.sketch.compare, name)) for name in wants if self.sketch and name != "norm"
        }
        batch.post(self._bare, Fetch, dict(wants), checks, weight=self.stored.number)
        fetched = {}
        for name in wants:
            fetched[name] = batch.decoded(name, lambda replies: replies[self.target.worker].checked().clone())
        return fetched

    def _restore(self, plain: Mapping[str, Tensor]) -> None:
        """Give everything back to the parameters and their optimizer."""
        self.product.residence = None
        self.product.engine.residences.discard(self)
        gradients = plain["gradient"].split(self.sizes) if "gradient" in plain else [None] * len(self.sizes)
        for parameter, w, gradient in zip(self.parameters, plain["w"].split(self.sizes), gradients, strict=True):
            bring_back(parameter, w.clone() if len(self.sizes) > 1 else w)
            parameter.grad = None if gradient is None else gradient * self.scale
        kept = {name: tensor for name, tensor in plain.items() if name not in ("w", "gradient")}
        self.terms.keep(self.parameters, kept, self.steps)

    def _loss(self, why: str) -> WeightsLostError:
        lost = WeightsLostError(
            f"layer {self.name!r}: its weight lived on worker {self.where} (update='worker') and is lost with "
            f"{self.steps} updates since it was last here: {why}. To go on, call session.abandon_lost_weights(), then "
            "load the last checkpoint into model and optimizer (tempo train does so by itself)"
        )
        lost.worker = self.target.worker
        return lost

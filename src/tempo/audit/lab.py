"""Records what workers see without any: sessions whose worker is a function in this process.

Schemes, engine and placement are the real ones; only the wire is left out. So controls, curves and experiments cost no
processes and no files, and an attacker can find out how Tempo sends a network of its own.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import torch
from torch import Tensor, nn

from tempo.audit import transcript
from tempo.audit.transcript import Record, View
from tempo.audit.truth import Truth
from tempo.engine.batch import Posted
from tempo.engine.link import ACKNOWLEDGED, Link
from tempo.engine.measure import Measurement
from tempo.engine.trace import Exchange
from tempo.errors import WorkerLacksWeightError
from tempo.initial import Base
from tempo.schemes.base import Scheme
from tempo.session import Session
from tempo.settings import Settings, parse
from tempo.wire.address import Address
from tempo.wire.messages import PROTOCOL, Backward, Fetch, Forward, Linear, Store, Update, Welcome
from tempo.worker.budget import Budget
from tempo.worker.compute import Incoming, TorchCompute
from tempo.worker.store import Numbers

Message = Store | Forward | Backward | Update | Fetch


class _Buffers:
    """Stands for those of a link: nothing is shared, nor used again."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def private(self, reply: Tensor) -> None:
        """It is private as it is."""

    def release(self, tensor: Tensor) -> None:
        """It goes by itself."""


class _Worker:
    """Stands for a link: computes at once, and keeps everything it gets."""

    def __init__(self, number: int, operator: str, sequence: Callable[[], int]) -> None:
        self.address = Address(host="lab", port=number, operator=operator)
        self.welcome, self.unbound = Welcome(PROTOCOL, "lab", "lab", 0), ""
        self.buffers = _Buffers()
        self.index, self.last_id, self.bytes_sent, self.bytes_received, self.worker_nanoseconds = number, 0, 0, 0, 0
        self.records: list[Record] = []
        self._sequence = sequence
        self._compute = TorchCompute(torch.device("cpu"))
        self._numbers = Numbers(self._compute, Budget(sys.maxsize).open())

    def request(
        self,
        message: Message,
        tensors: Mapping[str, Tensor],
        wants: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        exchange: Exchange | None = None,
    ) -> dict[str, Future[Any]]:
        self.last_id = self._sequence()
        if isinstance(message, Store) and message.digests:
            lacking: Future[Any] = Future()
            lacking.set_exception(WorkerLacksWeightError("it has no checkpoints"))
            return {ACKNOWLEDGED: lacking}
        seen = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        answers = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wants.items()}
        with torch.no_grad():
            self._serve(message, seen, answers)
        if isinstance(message, Update):
            seen["w"] = self._numbers.weight(message.weight).clone()
        self.records.append(
            Record(
                message.step,
                self.last_id,
                message.layer,
                type(message).__name__.lower(),
                str(self.address),
                message.weight,
                getattr(message, "operand", 0),
                getattr(message, "product", Linear()),
                seen | {name: answer.clone() for name, answer in answers.items()},
            )
        )
        futures: dict[str, Future[Any]] = {name: Future() for name in answers} or {ACKNOWLEDGED: Future()}
        for name, future in futures.items():
            future.set_result(answers.get(name))
        return futures

    def _serve(self, message: Message, seen: dict[str, Tensor], answers: dict[str, Tensor]) -> None:
        numbers, compute = self._numbers, self._compute
        if (seed := seen.pop("seed", None)) is not None and isinstance(message, Forward | Backward):
            (answer,), features = answers.values(), numbers.weight(message.weight).shape
            name, width = ("x", features[1]) if isinstance(message, Forward) else ("g", features[0])
            seen[name] = torch.empty(len(answer), width, dtype=torch.int32)
            compute.expand(seed.numpy().tobytes(), seen[name])
        match message:
            case Store():
                numbers.put_weight(message.weight, {name: Incoming(tensor) for name, tensor in seen.items()})
            case Forward():
                if message.operand:
                    numbers.put_operand(message.operand, Incoming(seen["x"]))
                if "y" in answers:
                    compute.forward(message.product, seen["x"], numbers.weight(message.weight), answers["y"])
            case Backward():
                g = seen["g"]
                if "dx" in answers:
                    compute.input_gradient(message.product, g, numbers.weight(message.weight), answers["dx"])
                if "dw" in answers:
                    compute.weight_gradient(message.product, g, numbers.operand(message.operand), answers["dw"])
                if message.accumulate:
                    numbers.accumulate(message.weight, message.product, g, numbers.operand(message.operand))
            case Update():
                numbers.update(message.weight, message.rule, message.scale)
            case Fetch():
                for name, answer in answers.items():
                    kept = numbers.weight(message.weight, "gradient" if name == "norm" else name)
                    (compute.norm if name == "norm" else compute.fetch)(kept, answer)

    def forget(self, weights: Iterable[int] = (), operands: Iterable[int] = (), gradients: Iterable[int] = ()) -> None:
        self._numbers.forget(weights, operands, gradients)

    def measure(self) -> Measurement:
        return Measurement(latency_s=1e-4, upload_bytes_per_s=1e10, download_bytes_per_s=1e10, flops_per_s=1e12)

    def close(self) -> None:
        """Nothing is open."""


class _Memory:
    """Stands for a `TruthRecorder`: keeps what it would have written."""

    def __init__(self) -> None:
        self.records: dict[tuple[int, int, int, str], dict[str, Tensor]] = {}
        self.names: dict[int, str] = {}

    def masked_by(self, scheme: str) -> None:
        pass  # the caller knows

    def named(self, layer: int, name: str) -> None:
        self.names[layer] = name

    def record(self, posted: Posted, operation: str, tensors: dict[str, Tensor]) -> None:
        place = posted.step, posted.sequence, posted.layer, operation
        self.records[place] = {name: tensor.detach().clone() for name, tensor in tensors.items()}


@dataclass
class Lab:
    """An open session with recording workers in this process."""

    session: Session
    _workers: list[_Worker] = field(repr=False, default_factory=list)
    _memory: _Memory = field(repr=False, default_factory=_Memory)

    @property
    def views(self) -> list[View]:
        """What each worker has seen so far."""
        return transcript.assemble(record for worker in self._workers for record in worker.records)

    def truth(self, victim: nn.Module | None = None) -> Truth:
        """What is behind it."""
        return Truth(dict(self._memory.records), dict(self._memory.names), victim)


@contextmanager
def open_lab(
    workers: int = 1,
    operators: int = 1,
    settings: Settings | None = None,
    masks: Scheme | None = None,
    **fields: Any,
) -> Iterator[Lab]:
    """A session with ``workers`` recording workers of ``operators`` operators, in this process; all goes out.

    Args:
        workers: How many.
        operators: Of how many operators they are, in turn.
        settings: A whole settings object, instead of ``fields``.
        masks: A scheme of the caller's own, weakened for a control say, instead of the settings'.
        fields: Fields of `Settings`; ``placement="all"`` and ``verify="off"`` unless given.
    """
    settings = settings or parse({"placement": "all", "verify": "off", **fields}, "open_lab()")
    last = 0

    def sequence() -> int:
        nonlocal last
        last += 1
        return last

    links = [_Worker(i, f"operator{i % operators}", sequence) for i in range(workers)]
    name = secrets.token_hex(8)
    session = Session(cast("list[Link]", links), msgspec.structs.replace(settings, insecure_record_truth=""), name)
    if masks is not None:
        session._engine.scheme = masks
    # Warnings are for users; an audit knows what it plays with.
    session._engine.warn_once = lambda text, category=RuntimeWarning: None  # type: ignore[method-assign]
    memory = _Memory()
    session._engine.truth = cast("Any", memory)
    with session:
        yield Lab(session, links, memory)


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    *,
    lr: float = 0.05,
    optimizer: torch.optim.Optimizer | None = None,
    trusted: tuple[str, ...] = (),
    base: Base = "secret",
    **fields: Any,
) -> Lab:
    """Train ``model`` for one pass over ``batches`` in a lab, and return what was recorded; the model is plain again.

    Args:
        model: Changed by training.
        batches: Inputs and labels.
        loss: Of the model on a batch.
        lr: Of plain SGD, unless ``optimizer`` is given.
        optimizer: Over the model's parameters.
        trusted: Layers to keep.
        base: ``secret`` or ``public``: which preset of the scheme masks it.
        fields: For `open_lab`.
    """
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr)
    with open_lab(**fields) as lab:
        lab.session.protect(model, base=base, trusted=trusted)
        lab.session.optimizer(optimizer)
        for x, labels in batches:
            optimizer.zero_grad()
            loss(model, x, labels).backward()
            optimizer.step()
        lab.session.unprotect(model)
    return lab


def product_order(
    model: nn.Module, inputs: Tensor, trusted: tuple[str, ...] = (), *, unfold: bool = False
) -> list[tuple[list[str], tuple[int, ...]]]:
    """Which modules each product of a training step stands for, in order, and its weight's shape (m×d…).

    Taken from the third step, when layers that share an input have been found.
    """
    with open_lab(scheme="insecure-plain", unfold=unfold) as lab:
        lab.session.protect(model, base="secret", trusted=trusted)
        for _ in range(3):
            output = model(inputs)
            scores = getattr(output, "logits", output)
            scores.sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + 1e-6)
        lab.session.unprotect(model)
        calls = lab.views[0].calls if lab.views else []
        names = lab.truth().names
    last = max((call.step for call in calls), default=0)
    return [(names[call.layer].split(" + "), tuple(call.w.shape)) for call in calls if call.step == last]

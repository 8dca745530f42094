"""What masks, checks and products take on this machine, measured on small operands of the kinds that a model has."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any, Final, Protocol, final

import torch
from torch import Tensor

from tempo.engine.dtypes import masked_dtype
from tempo.engine.geometry import Shape, flops, output_shape
from tempo.engine.reply import Received
from tempo.engine.stats import Stats
from tempo.engine.verifier import Verifier
from tempo.keys import KeySchedule
from tempo.schemes import arithmetic
from tempo.schemes.base import Problem, Scheme, Target
from tempo.schemes.reply import Reply
from tempo.verify.checks import AnswerCheck, WeightCheck
from tempo.wire.messages import Conv, Linear, Product

ELEMENTS: Final = 1 << 18
"""Of the largest operand of a sample: more than a core's own cache holds, milliseconds of work."""

WIDTH: Final = 512
"""Features beyond which an element costs no more, and a product runs no faster."""

CHANNELS: Final = 128
"""Likewise of a convolution, per group: its weight has as many elements again as its kernel has taps."""

_REPEATS: Final = 3
"""The least of so many counts; the one before them, which meets memory for the first time, does not."""

Seconds = dict[str, float]
"""By what they are spent on: an operand or an answer (``w``, ``x``, ``y``, ``g``, ``dx``, ``dw``)."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds that one product of some kind takes.

    Attributes:
        mask: Per element of an operand to mask it, of an answer to unmask it.
        check: Likewise, to check it.
        call: Per operand or answer, however small.
        flop: Per floating-point operation, where the product is computed here.
        copies: Of ``x``: how often it is sent.
    """

    mask: Mapping[str, float]
    check: Mapping[str, float]
    call: Mapping[str, float]
    flop: float
    copies: float = 1.0

    def seconds(self, elements: Mapping[str, float], checked: float) -> tuple[float, float]:
        """To mask and to check so many ``elements`` of each operand and answer, if a share ``checked`` of calls is."""
        mask = sum(count * self.mask[name] + self.call[name] for name, count in elements.items())
        return mask, checked * sum(count * self.check[name] for name, count in elements.items())


class Costs(Protocol):
    """Tells the planner what things take."""

    def rates(self, scheme: Scheme, product: Product, x: Shape, w: Shape, dtype: torch.dtype) -> Rates:
        """Of a product of operands of these shapes, output features of ``w`` first, computed in ``dtype``."""
        ...


@final
class MeasuredCosts:
    """Runs a scheme's own masks, the checks and the product on a sample, once for each class of layer: some 20 ms.

    Args:
        wire_dtype: As in the settings.
        operators: Of the session's workers, distinct ones.

    Attributes:
        spent: Seconds that measuring took.
    """

    def __init__(self, wire_dtype: str, operators: Sequence[str]) -> None:
        self._wire_dtype = wire_dtype
        self._operators = list(dict.fromkeys(operators))
        self._keys: KeySchedule | None = None  # nothing that is sent is under them
        self._found: dict[tuple[object, ...], Rates] = {}
        self._tiny: dict[tuple[object, ...], Seconds] = {}
        self.spent = 0.0

    def rates(self, scheme: Scheme, product: Product, x: Shape, w: Shape, dtype: torch.dtype) -> Rates:
        """Measured where this class is met for the first time."""
        shapes = sample(product, x, w)
        key = (scheme, product, *shapes, dtype)
        if key not in self._found:
            started = time.perf_counter()
            self._found[key] = self._measure(scheme, product, *shapes, dtype)
            self.spent += time.perf_counter() - started
        return self._found[key]

    @torch.no_grad()
    def _measure(self, scheme: Scheme, product: Product, x: Shape, w: Shape, dtype: torch.dtype) -> Rates:
        self._keys = keys = self._keys or KeySchedule()
        targets = [Target(i, name, 1.0) for i, name in enumerate(self._operators[: scheme.traits.operators])]
        with torch.autocast("cpu", enabled=False):
            least = (scheme, dtype)
            if least not in self._tiny:
                side = getattr(scheme, "block", 1)
                problem = Problem(Linear(), masked_dtype(self._wire_dtype, dtype))
                took, _ = _least(_Run(scheme, problem, dtype, (1, side), (side, side), targets, keys))
                self._tiny[least] = {name: took[name] + took[f"check {name}"] for name in _NAMES}
            problem = Problem(product, masked_dtype(self._wire_dtype, dtype))
            took, run = _least(_Run(scheme, problem, dtype, x, w, targets, keys))
        call = self._tiny[least]
        masked = {name: took[name] + took[f"check {name}"] for name in _NAMES}
        # What is the same for the smallest operand is taken off, so that a large one does not count it many times.
        beyond = {name: max(0.0, 1 - call[name] / masked[name]) for name in _NAMES}
        return Rates(
            mask={name: took[name] * beyond[name] / run.elements[name] for name in _NAMES},
            check={name: took[f"check {name}"] * beyond[name] / run.elements[name] for name in _NAMES},
            call=call,
            flop=took["product"] / run.flops,
            copies=run.copies,
        )


_NAMES: Final = ("w", "x", "y", "g", "dx", "dw")


def sample(product: Product, x: Shape, w: Shape) -> tuple[Shape, Shape]:
    """Shapes of a small product of the class of one with operands of shapes ``x`` and ``w``.

    Rows are rounded down to a power of two, so that batches of every length do not make classes of their own.
    """
    if not isinstance(product, Conv):
        d, m = min(w[1], WIDTH), min(w[0], WIDTH)
        rows = min(x[0], max(ELEMENTS // max(d, m), 1))
        return (1 << rows.bit_length() - 1, d), (m, d)
    groups = product.groups
    d, m = min(w[1], CHANNELS), min(w[0] // groups, CHANNELS)
    images = 1 << min(x[0], 64).bit_length() - 1
    room = max(1, ELEMENTS // (images * groups * max(d, m)))
    side = max(2, int(room ** (1 / len(x[2:]))))
    reach = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(product.dilation, w[2:], strict=True)]
    pixels = [min(size, max(side, least)) for size, least in zip(x[2:], reach, strict=True)]
    return (images, groups * d, *pixels), (groups * m, d, *w[2:])


def _least(run: _Run) -> tuple[Seconds, _Run]:
    runs = [run() for _ in range(_REPEATS + 1)][1:]
    return {name: min(took[name] for took in runs) for name in runs[0]}, run


class _Run:
    """One product under a scheme from end to end, as the engine does it, with the worker's part done here."""

    def __init__(
        self,
        scheme: Scheme,
        problem: Problem,
        dtype: torch.dtype,
        x: Shape,
        w: Shape,
        targets: Sequence[Target],
        keys: KeySchedule,
    ) -> None:
        self._scheme, self._problem, self._dtype, self._keys, self._targets = scheme, problem, dtype, keys, targets
        self._x, self._w = _numbers(x, dtype), _numbers(w, dtype)
        self._g = _numbers(output_shape(problem.product, x, w), dtype)
        self.flops = 3 * flops(problem.product, x, w)
        self.elements: dict[str, int] = {}
        self.copies = 1.0

    def __call__(self) -> Seconds:
        """Seconds of each part."""
        product, wire, keys = self._problem.product, self._problem.wire_dtype, self._keys
        x, w, g = self._x, self._w, self._g
        took: Seconds = {}
        stats = Stats()
        # What `Received` needs of an engine: its answers do not lie in shared memory, and are all right.
        engine: Any = SimpleNamespace(
            links=[_Link()] * len(self._targets), stats=stats, verifier=Verifier("always"), step=0
        )

        @contextmanager
        def timed(name: str) -> Iterator[None]:
            before, checked = stats.seconds["mask"], stats.seconds["verify"]
            with stats.timed("mask"):
                yield
            took[name] = took.get(name, 0.0) + stats.seconds["mask"] - before
            check = f"check {name}"
            took[check] = took.get(check, 0.0) + stats.seconds["verify"] - checked

        def received(name: str, worker: int, check: AnswerCheck) -> Received:
            return Received(engine, worker, name, "", answers[name][worker], check, nullcontext)

        with timed("w"):
            weight = self._scheme.encode_weight(self._problem, w, keys.fresh(0, "w"), self._targets, _empty)
        with timed("x"):
            source = weight.encode_input(x, keys.fresh(0, "x"), self._targets, _empty, lambda: w)
        with timed("g"):
            gradient = source.encode_gradient(g, keys.fresh(0, "g"), _empty, lambda: x, lambda: w, want_dw=True)
        masked = {o.worker: dict(o.tensors) for o in weight.operands}
        for operand in (*source.operands, *gradient.operands):
            masked[operand.worker] |= operand.tensors
        answers: dict[str, dict[int, Tensor]] = {"y": {}, "dx": {}, "dw": {}}
        replies: dict[str, dict[int, Reply]] = {"y": {}, "dx": {}, "dw": {}}
        for worker, sent in masked.items():
            plain = {name: tensor.to(self._dtype) for name, tensor in sent.items()}
            with timed("product"):
                y = arithmetic.output(product, plain["x"], plain["w"])
                dx = arithmetic.input_gradient(product, plain["g"], plain["w"], tuple(plain["x"].shape))
                dw = arithmetic.weight_gradient(product, plain["x"], plain["g"], tuple(plain["w"].shape))
            for name, answer in {"y": y, "dx": dx, "dw": dw}.items():
                answers[name][worker] = answer.to(wire)
            with timed("w"), stats.timed("verify"):
                kept = WeightCheck(product, sent["w"], keys.fresh(0, "verify-w"))
            with timed("x"), stats.timed("verify"):
                inputs = kept.forward(sent["x"], keys.fresh(0, "verify-x"), keep=True)
            with timed("g"), stats.timed("verify"):
                gradients = inputs.backward(sent["g"], want_dx=True, want_dw=True)
            replies["y"][worker] = received("y", worker, inputs.output_check())
            replies["dx"][worker] = received("dx", worker, gradients.input_gradient_check())
            replies["dw"][worker] = received("dw", worker, gradients.weight_gradient_check())
        with timed("y"):
            source.decode_output(replies["y"], [len(w)])
        with timed("dx"):
            gradient.decode_input_gradient(replies["dx"])
        with timed("dw"):
            gradient.decode_weight_gradient(replies["dw"], [len(w)])
        everything = [*masked.values(), *({name: t} for name, by_worker in answers.items() for t in by_worker.values())]
        self.elements = {name: sum(part[name].numel() for part in everything if name in part) for name in _NAMES}
        self.flops = 3 * sum(flops(product, tuple(s["x"].shape), tuple(s["w"].shape)) for s in masked.values())
        self.copies = len(masked)
        return took


class _Link:
    """A worker's link, for answers that were computed here."""

    address = "here"

    def private(self, reply: Tensor) -> Tensor | None:
        """As it is: nobody else has it."""
        return None

    def release(self, reply: Tensor) -> None:
        """Nobody waits for it."""


def _numbers(shape: Shape, dtype: torch.dtype) -> Tensor:
    """No row of zeros, which schemes would cover; and nothing of the user's random generator."""
    return torch.linspace(-1, 2, prod(shape)).view(shape).to(dtype)


def _empty(worker: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)

"""What masks, checks and products take on this machine, measured on small operands of the kinds that a model has."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, final

import torch

from tempo.engine.dtypes import masked_dtype
from tempo.engine.geometry import Shape
from tempo.engine.sample_run import NAMES, SampleRun, Seconds
from tempo.keys import KeySchedule
from tempo.schemes.base import Problem, Scheme, Target
from tempo.wire.messages import Conv, Linear, Product

ELEMENTS: Final = 1 << 18
"""Of the largest operand of a sample: more than a core's own cache holds, milliseconds of work."""

WIDTH: Final = 512
"""Features beyond which an element costs no more, and a product runs no faster."""

CHANNELS: Final = 128
"""Likewise of a convolution, per group: its weight has as many elements again as its kernel has taps."""

_REPEATS: Final = range(2, 5)
"""How often a sample runs: the least counts, so that memory met for the first time does not."""

_ENOUGH: Final = 0.03
"""Seconds after which it runs no more often than it has to."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds that one product of some kind takes.

    Attributes:
        mask: Per element of an operand to mask it, of an answer to unmask it; of those that travel.
        check: Likewise, to check it.
        call: Per operand or answer, however small.
        flop: Per floating-point operation, where the product is computed here.
        copies: Of an operand or answer: how often its elements travel, rows that a scheme adds left out.
    """

    mask: Mapping[str, float]
    check: Mapping[str, float]
    call: Mapping[str, float]
    flop: float
    copies: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 1.0))

    def travelling(self, elements: Mapping[str, float]) -> dict[str, float]:
        """How many elements travel for so many of each operand and answer."""
        return {name: count * self.copies[name] for name, count in elements.items()}

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
                took, _ = _least(SampleRun(scheme, problem, dtype, (1, side), (side, side), targets, keys))
                self._tiny[least] = {name: took[name] + took[f"check {name}"] for name in NAMES}
            problem = Problem(product, masked_dtype(self._wire_dtype, dtype))
            took, run = _least(SampleRun(scheme, problem, dtype, x, w, targets, keys))
        call = self._tiny[least]
        masked = {name: took[name] + took[f"check {name}"] for name in NAMES}
        # What is the same for the smallest operand is taken off, so that a large one does not count it many times.
        beyond = {name: max(0.0, 1 - call[name] / masked[name]) if masked[name] else 0.0 for name in NAMES}
        return Rates(
            mask={name: took[name] * beyond[name] / max(1, run.elements[name]) for name in NAMES},
            check={name: took[f"check {name}"] * beyond[name] / max(1, run.elements[name]) for name in NAMES},
            call=call,
            flop=took["product"] / run.flops,
            copies={name: run.elements[name] / whole for name, whole in run.whole.items()},
        )


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


def _least(run: SampleRun) -> tuple[Seconds, SampleRun]:
    started = time.perf_counter()
    runs: list[Seconds] = []
    while len(runs) < _REPEATS.start or (len(runs) < _REPEATS[-1] and time.perf_counter() - started < _ENOUGH):
        runs.append(run())
    return {name: min(took[name] for took in runs) for name in runs[0]}, run

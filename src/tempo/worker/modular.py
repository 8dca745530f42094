"""Products mod p of residues with small integers, exactly, by the faster of two ways.

Either in float64, or by limbs of eight bits whose products a device's integer units sum in int32. Both give the same
bits; which one is faster depends on device and shapes, and is measured. Not yet run on a GPU.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from functools import cached_property
from typing import ClassVar, Final, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from tempo.wire.residues import P, reduce_
from tempo.worker.device import Device

_EXACT: Final = (1 << 53) - P
"""Integers up to here, and what `reduce_` makes of them on the way, are float64 numbers: their sums are exact."""

_ROWS: Final = 32
"""Fewer at a time would be slow, however long they are."""

_TRIAL: Final = 256
"""Rows with which ways are compared."""

log = logging.getLogger("tempo.worker")


class Way(ABC):
    """A way to multiply by ``b``, which is prepared once for many rows.

    Args:
        b: (K, N), int8 or int16.
        largest: The largest magnitude in it, at least 1.
    """

    block: ClassVar[int]
    """Elements of the product that are computed at a time on a CPU, so that sums stay in its caches."""

    @abstractmethod
    def __init__(self, b: Tensor, largest: int) -> None: ...

    @abstractmethod
    def sums(self, a: Tensor) -> Tensor:
        """``a b`` but for multiples of p: float64 integers (T, N), no larger than `_EXACT`."""

    def multiply(self, a: Tensor, out: Tensor) -> None:
        """``a b mod p``.

        Args:
            a: int32 (T, K): residues, or any other numbers.
            out: Residues (T, N), int32.
        """
        block = self.block if a.device.type == "cpu" else 1 << 24
        rows = max(_ROWS, block // max(1, out.shape[1]))
        for start in range(0, len(a), rows):
            part = slice(start, start + rows)
            out[part].copy_(reduce_(self.sums(a[part])))


@final
class Doubles(Way):
    """In float64, by as many columns of ``a`` at a time as keep sums exact."""

    block = 1 << 20

    def __init__(self, b: Tensor, largest: int) -> None:
        self._b = b.double()
        self._step = _EXACT // (largest << 31) - 1  # with what was summed before

    def sums(self, a: Tensor) -> Tensor:
        """By `torch.addmm`."""
        total = a.new_zeros(len(a), self._b.shape[1], dtype=torch.float64)
        for start in range(0, a.shape[1], self._step):
            part = slice(start, start + self._step)
            if start:
                reduce_(total)
            total.addmm_(a[:, part].double(), self._b[part])
        return total


@final
class Limbs(Way):
    """By signed limbs of eight bits: four of ``a``, and one or two of ``b``."""

    block = 1 << 18
    most: Final = 0x7F7F
    """The largest integer of two limbs."""

    _top: Final = 0x7F7F7F7F
    """The largest integer of four limbs; from those above it p is taken."""

    _step: Final = 1 << 13
    """Columns of ``a`` at a time: sums are below 2^14 · 2^13 · 2.01 · 2^24, and those of int8 within int32."""

    def __init__(self, b: Tensor, largest: int) -> None:
        self._n = b.shape[1]
        columns = b.t().contiguous()  # cuBLAS has no int8 product of two matrices that lie by rows
        low = columns.to(torch.int8)  # the low byte, signed
        self._b = [_padded(low).t()]
        if b.dtype != torch.int8:
            self._b.append(_padded((columns - low).bitwise_right_shift_(8).to(torch.int8)).t())

    def sums(self, a: Tensor) -> Tensor:
        """By `torch._int_mm`, all limbs of ``a`` at once."""
        total = a.new_zeros(len(a), self._n, dtype=torch.float64)
        for start in range(0, a.shape[1], self._step):
            part = slice(start, start + self._step)
            if start:
                reduce_(total)
            limbs = self._limbs(a[:, part])
            for j, b in enumerate(self._b):
                products = torch._int_mm(limbs, b[part]).view(4, -1, b.shape[1])
                for i in range(4):
                    power = 1 << 8 * (i + j) if i + j < 4 else 5  # 2^32 mod p
                    total.add_(products[i, : len(a), : self._n], alpha=power)
        return total

    def _limbs(self, a: Tensor) -> Tensor:
        """Those of all rows, the least significant first: int8 (4 T, K), padded."""
        a = _padded(a, 5)
        carried = a.long().add_(0x808080).add_(a > self._top, alpha=5)  # a - p = a + 5 - 2^32
        limbs = carried.to(torch.int32).bitwise_xor_(0x808080).view(torch.int8).view(*a.shape, 4)
        return limbs.permute(2, 0, 1).reshape(-1, a.shape[1])


@final
class Multiplier:
    """Products mod p on one device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._faster: dict[tuple[object, ...], type[Way]] = {}
        self._largest: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def prepare(self, a: Tensor, w: Tensor, *, forward: bool) -> Way:
        """The faster way to multiply ``a`` by ``wᵀ``, or by ``w`` if not ``forward``.

        Args:
            a: int32 (T, K), all rows that are about to be multiplied.
            w: A stored weight, int8 or int16, which does not change any more.
            forward: Which way through it.
        """
        largest = self._largest.get(w)
        if largest is None:
            largest = self._largest[w] = max(1, int(w.max()), -int(w.min())) if w.numel() else 1
        b = w.t() if forward else w
        if largest > Limbs.most or not a.numel() or not b.numel() or not self._exact:
            return Doubles(b, largest)
        sizes = (size.bit_length() for size in (*a.shape, b.shape[1]))
        case = (w.dtype, forward, *sizes)
        if case not in self._faster:
            self._faster[case] = self._compare(a[:_TRIAL], b, largest)
        return self._faster[case](b, largest)

    def _compare(self, a: Tensor, b: Tensor, largest: int) -> type[Way]:
        out = a.new_empty(len(a), b.shape[1])
        seconds: dict[type[Way], float] = {}
        for way in (Doubles, Limbs) * 2:  # at the first time libraries look for the best of their own ways
            start = time.perf_counter()
            way(b, largest).multiply(a, out)
            self._device.mark()()
            seconds[way] = time.perf_counter() - start
        return min(seconds, key=lambda way: seconds[way])

    @cached_property
    def _exact(self) -> bool:
        """Whether there are int8 products here, and exact: some instructions of CPUs saturate at 16 bits between."""
        ends = torch.tensor([-128, 127], dtype=torch.int8, device=self._device.torch)
        rows = [ends[:1].repeat(64), ends[1:].repeat(64), ends.repeat(32), ends.flip(0).repeat(32)]
        a = torch.stack(rows).repeat(8, 1)
        try:
            if torch.equal(torch._int_mm(a, a.t()).double(), a.double() @ a.double().t()):
                return True
            why = "they are not exact"
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
        log.warning("products mod p are computed in float64, not by int8 products: %s", why)
        return False


def _padded(x: Tensor, rows: int = 0) -> Tensor:
    """With zeros, up to multiples of eight in both axes for a weight, of eight columns and ``rows`` for an operand.

    CUDA multiplies no other matrices of int8.
    """
    below = max(0, rows - len(x)) if rows else -len(x) % 8
    right = -x.shape[1] % 8
    return F.pad(x, (0, right, 0, below)) if below or right else x

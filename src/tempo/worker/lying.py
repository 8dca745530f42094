"""A worker that lies, to see it caught: for tests and demonstrations of the trusted side."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Final, final

import torch
from torch import Tensor

from tempo.errors import SettingsError, nearest
from tempo.wire.messages import Product
from tempo.worker.budget import Account
from tempo.worker.compute import Compute, Incoming, Kept


def _rows(out: Tensor) -> Tensor:
    """``out`` as rows × the rest."""
    return out.view(len(out), -1)


def _element(out: Tensor, _: Tensor | None) -> None:
    """One number is off by the size of a typical one."""
    flat = out.view(-1)
    flat[len(flat) // 2] += out.float().square().mean().sqrt().to(out.dtype) + 1e-3


def _row(out: Tensor, _: Tensor | None) -> None:
    """One row is twice as long."""
    _rows(out)[len(out) // 2] *= 2


def _swap(out: Tensor, _: Tensor | None) -> None:
    """Two rows change places."""
    _rows(out)[[0, -1]] = _rows(out)[[-1, 0]]


def _stale(out: Tensor, before: Tensor | None) -> None:
    """The answer to an earlier request of the same shape."""
    if before is not None:
        out.copy_(before)


def _zeros(out: Tensor, _: Tensor | None) -> None:
    """Nothing was computed."""
    out.zero_()


def _nan(out: Tensor, _: Tensor | None) -> None:
    """One number is not one."""
    out.view(-1)[0] = torch.nan


def _infinity(out: Tensor, _: Tensor | None) -> None:
    """One number is infinite."""
    out.view(-1)[-1] = torch.inf


def _spread(out: Tensor, _: Tensor | None) -> None:
    """Every number is off by a little: a tenth of a per cent of a typical one."""
    scale = 1e-3 * out.float().square().mean().sqrt()
    out += (torch.randn(out.shape) * scale).to(out.dtype)


LIES: Final[dict[str, Callable[[Tensor, Tensor | None], None]]] = {
    "element": _element,
    "row": _row,
    "swap": _swap,
    "stale": _stale,
    "zeros": _zeros,
    "nan": _nan,
    "infinity": _infinity,
    "spread": _spread,
}


@final
class LyingCompute(Compute):
    """Answers rightly but for every so many times.

    Args:
        honest: What computes the right answers.
        lie: Name of a lie; ``NAME:N`` tells it with every N-th answer only, the N-th being the first.

    Raises:
        SettingsError: There is no such lie.
    """

    def __init__(self, honest: Compute, lie: str) -> None:
        name, _, every = lie.partition(":")
        if name not in LIES or (every and not (every.isdigit() and int(every))):
            raise SettingsError(f"--insecure-lie: NAME or NAME:N, not {lie!r}; {nearest(name, LIES)}")
        self.description = f"{honest.description}, lying"
        self._honest = honest
        self._lie = LIES[name]
        self._every = int(every or 1)
        self._count = itertools.count(1)
        self._lock = threading.Lock()
        self._earlier: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def keep(self, incoming: Incoming, account: Account) -> Kept:
        """Honestly."""
        return self._honest.keep(incoming, account)

    def forward(self, product: Product, x: Tensor, w: Tensor, out: Tensor) -> None:
        """``y``, or a lie."""
        self._honest.forward(product, x, w, out)
        self._tell(out)

    def input_gradient(self, product: Product, g: Tensor, w: Tensor, out: Tensor) -> None:
        """``dx``, or a lie."""
        self._honest.input_gradient(product, g, w, out)
        self._tell(out)

    def weight_gradient(self, product: Product, g: Tensor, x: Tensor, out: Tensor) -> None:
        """``dw``, or a lie."""
        self._honest.weight_gradient(product, g, x, out)
        self._tell(out)

    def probe(self, size: int) -> None:
        """Honestly."""
        self._honest.probe(size)

    def fill(self, out: Tensor) -> None:
        """Honestly."""
        self._honest.fill(out)

    def _tell(self, out: Tensor) -> None:
        key = out.shape, out.dtype
        with self._lock:
            right = out.clone()
            if next(self._count) % self._every == 0:
                self._lie(out, self._earlier.get(key))
            self._earlier[key] = right

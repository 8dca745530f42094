"""A worker that lies, to see it caught: for tests and demonstrations of the trusted side."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Final, final

import torch
from msgspec.structs import replace
from torch import Tensor

from tempo.errors import SettingsError, nearest
from tempo.wire.messages import Muon, Product, Rule
from tempo.worker.budget import Account
from tempo.worker.compute import Compute, Incoming, Kept


def _rows(out: Tensor) -> Tensor:
    """``out`` as rows × the rest."""
    return out.view(len(out), -1)


def _element(out: Tensor, _: Tensor | None) -> None:
    """One number is off by the size of a typical one."""
    flat = out.view(-1)
    flat[len(flat) // 2] += (out.float().square().mean().sqrt() + 1e-3).to(out.dtype)


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
    """One number is not one; one residue is none."""
    out.view(-1)[0] = torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min


def _infinity(out: Tensor, _: Tensor | None) -> None:
    """One number is infinite, or as large as can be."""
    out.view(-1)[-1] = torch.inf if out.is_floating_point() else torch.iinfo(out.dtype).max


def _spread(out: Tensor, _: Tensor | None) -> None:
    """Every number is off by a little: a tenth of a per cent of a typical one."""
    scale = 1e-3 * out.float().square().mean().sqrt()
    out += (torch.randn(out.shape) * scale).to(out.dtype)


Step = Callable[[Rule], None]
"""Changes the weight by a rule, honestly."""


def _not_updated(rule: Rule, w: Tensor, step: Step) -> None:
    """Nothing is done, and said to be done."""


def _other_rate(rule: Rule, w: Tensor, step: Step) -> None:
    """Ten times the learning rate."""
    rates = {"lr": 10 * rule.lr} | ({"adjusted_lr": 10 * rule.adjusted_lr} if isinstance(rule, Muon) else {})
    step(replace(rule, **rates))


def _forged_update(rule: Rule, w: Tensor, step: Step) -> None:
    """Noise on the weight, of a twentieth of its change."""
    before = w.clone()
    step(rule)
    w += torch.randn_like(w) * (0.05 * (w - before).square().mean().sqrt())


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
"""Lies that alter answers."""

UPDATE_LIES: Final[dict[str, Callable[[Rule, Tensor, Step], None]]] = {
    "not-updated": _not_updated,
    "other-rate": _other_rate,
    "forged-update": _forged_update,
}
"""Lies about changes of weights that live on the worker."""


@final
class LyingCompute(Compute):
    """Answers rightly, and updates weights rightly, but for every so many times.

    Args:
        honest: What computes the right answers.
        lie: Name of a lie; ``NAME:N`` tells it with every N-th answer only, the N-th being the first, or with every
            N-th update of a weight if that is what it is about.

    Raises:
        SettingsError: There is no such lie.
    """

    def __init__(self, honest: Compute, lie: str) -> None:
        name, _, every = lie.partition(":")
        lies = LIES | UPDATE_LIES
        if name not in lies or (every and not (every.isdigit() and int(every))):
            raise SettingsError(f"--insecure-lie: NAME or NAME:N, not {lie!r}; {nearest(name, lies)}")
        self.description = f"{honest.description}, lying"
        self.device = honest.device
        self._honest = honest
        self._lie = LIES.get(name)
        self._update_lie = UPDATE_LIES.get(name)
        self._every = int(every or 1)
        self._count = itertools.count(1)
        self._lock = threading.Lock()
        self._earlier: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def keep(self, incoming: Incoming, account: Account) -> Kept:
        """Honestly."""
        return self._honest.keep(incoming, account)

    def zeros(self, like: Tensor, account: Account) -> Kept:
        """Honestly."""
        return self._honest.zeros(like, account)

    def expand(self, seed: bytes, out: Tensor) -> None:
        """Honestly."""
        self._honest.expand(seed, out)

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

    def accumulate(self, product: Product, g: Tensor, x: Tensor, gradient: Tensor) -> None:
        """Honestly: it is no answer."""
        self._honest.accumulate(product, g, x, gradient)

    def update(self, rule: Rule, scale: float, w: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        """A step, or a lie."""

        def step(rule: Rule) -> None:
            self._honest.update(rule, scale, w, gradient, state)

        if self._update_lie is None or not self._is_due():
            step(rule)
        else:
            self._update_lie(rule, w, step)

    def fetch(self, kept: Tensor, out: Tensor) -> None:
        """What was kept, or a lie."""
        self._honest.fetch(kept, out)
        self._tell(out)

    def norm(self, kept: Tensor, out: Tensor) -> None:
        """The length, or a lie."""
        self._honest.norm(kept, out)
        self._tell(out)

    def probe(self, size: int) -> None:
        """Honestly."""
        self._honest.probe(size)

    def fill(self, out: Tensor) -> None:
        """Honestly."""
        self._honest.fill(out)

    def _tell(self, out: Tensor) -> None:
        if self._lie is None:
            return
        key = out.shape, out.dtype
        with self._lock:
            right = out.clone()
            if self._is_due():
                self._lie(out, self._earlier.get(key))
            self._earlier[key] = right

    def _is_due(self) -> bool:
        return next(self._count) % self._every == 0

"""One call in parts, by rows: while workers compute one part, the next is masked, or the one before it unmasked.

Each part is a call of its own, under row masks of its own, on one and the same masked weight. So each brings a ``dW``,
which costs its way back: the planner reckons with that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tempo.schemes.total import summed

if TYPE_CHECKING:
    from tempo.engine.call import Call, Finish, Gradients, Saved
    from tempo.schemes.low_rank import LowRank


class CallInParts:
    """Forward calls of consecutive rows of one input, and the backward pass through them."""

    residence = None

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        self._rows: list[int] = [call.shapes[0][0] for call in calls]

    @property
    def total(self) -> Tensor | None:
        """As `Call.total`."""
        return summed([call.total for call in self._calls])

    def begin_backward(self, g: Tensor, saved: Saved, *, want_dx: bool, want_dw: bool) -> Finish:
        """Send all parts of ``g~`` before any gradient is awaited; otherwise as `Call.begin_backward`."""
        wants = {"want_dx": want_dx, "want_dw": want_dw}
        end, finishes = 0, []
        for call, part in zip(self._calls, g.split(self._rows), strict=True):
            rows = slice(end, end := end + len(part))
            finishes.append((call.begin_backward(part, partial(_of_rows, saved, rows), **wants), rows))

        def finish(added: LowRank | None = None, /) -> Gradients:
            found = [one(None if added is None else added.of_rows(rows)) for one, rows in finishes]
            dx = torch.cat([part for part, _ in found if part is not None]) if want_dx else None
            return dx, partial(_sum, [dw for _, dw in found if dw is not None]) if want_dw else None

        return finish


def _of_rows(saved: Saved, rows: slice) -> tuple[Tensor, list[Tensor]]:
    x, weights = saved()
    return x[rows], weights


def _sum(parts: Sequence[Callable[[], list[Tensor]]]) -> list[Tensor]:
    """Each part's gradients, member by member, added to the first's."""
    total, *others = (part() for part in parts)
    for other in others:
        for sum_, dw in zip(total, other, strict=True):
            sum_ += dw
    return total

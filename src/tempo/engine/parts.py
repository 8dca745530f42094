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

if TYPE_CHECKING:
    from tempo.engine.call import Call, Gradients, Saved


class CallInParts:
    """Forward calls of consecutive rows of one input, and the backward pass through them."""

    residence = None

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        self._rows: list[int] = [call.shapes[0][0] for call in calls]

    def backward(self, g: Tensor, saved: Saved, *, want_dx: bool, want_dw: bool) -> Gradients:
        """Send all parts of ``g~`` before any gradient is awaited; otherwise as `Call.backward`."""
        wants = {"want_dx": want_dx, "want_dw": want_dw}
        end, finishes = 0, []
        for call, part in zip(self._calls, g.split(self._rows), strict=True):
            rows = slice(end, end := end + len(part))
            finishes.append(call.begin_backward(part, partial(_of_rows, saved, rows), **wants))
        found = [finish() for finish in finishes]
        dx = torch.cat([part for part, _ in found if part is not None]) if want_dx else None
        return dx, partial(_sum, [dw for _, dw in found if dw is not None]) if want_dw else None


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

"""The sum of the rows of ``G``, a bias's gradient, from sums of ``G~`` that are made while it is written.

With ``G~ = L^-T G P``, ``1ᵀ G P = (L 1)ᵀ G~``: one weight for each row, beside those that checks sum columns with.
Only rounding in single precision is added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tempo.schemes.masks import Form, Masks
from tempo.schemes.reply import MOST_WEIGHTS, Tally
from tempo.schemes.sandwich import sandwich


class Total:
    """Has a matrix's rows summed while it is masked.

    Args:
        masks: Around ``G``.
        rows: Of ``G``; of maps, images, whose pixels then are rows.
        tally: What is summed of ``G~`` anyway.
    """

    def __init__(self, masks: Masks, rows: int, tally: Tally) -> None:
        self._masks, self._asked = masks, tally
        self.tally = tally
        """What to have summed instead."""
        if tally.weights is not None and len(tally.weights) < MOST_WEIGHTS:
            weights = torch.empty(rows, 1)
            sandwich(torch.ones(rows, 1), masks.L.operator(Form.PLAIN), None, [weights])
            of_pixels = weights.expand(-1, tally.weights.shape[1] // rows).reshape(1, -1)
            self.tally = Tally(tally.vectors, torch.cat([tally.weights, of_pixels]))

    def made(self) -> Tensor | None:
        """The sum (m), once ``G~`` was written; None if that was without sums."""
        if self.tally is self._asked or self.tally.columns is None:
            return None
        sums, lengths = self.tally.columns
        self._asked.rows, self._asked.columns = self.tally.rows, (sums[:-1], lengths)
        total = torch.empty(1, sums.shape[1])
        sandwich(sums[-1:], None, self._masks.P.operator(Form.INVERSE), [total])
        return total[0]


def summed(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of the rows of all parts of a matrix, by row; None if it is not known of each."""
    found = [part for part in parts if part is not None]
    return sum(found[1:], found[0]) if found and len(found) == len(parts) else None

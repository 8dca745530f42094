"""Two rounds of blocks: a sparse-frame start, then structured least squares over all four rounds at once.

A two-round mask is dense where blocks are larger than the root of the width, but its entries are still uneven: a pair
of groups shares few hidden features or many. That much shows in fourth powers, and the wider the layer the more.
Between two groups the mask has low rank and singular values of 1, which gives the groups away, then both rounds.
What remains of the private change under blocks of side s: delta error √((d+m)(s−1)/(dm)).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tempo.audit.attack import Attack, Control, Effort, NotApplicable, Outcome
from tempo.audit.attacks.sparse_frame import (
    DRIFTS,
    TRIES,
    Framed,
    FrameGuess,
    begin,
    guess,
    luckiest,
    mask_figures,
    single,
    targets,
)
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import small_mix
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers import blockwise
from tempo.audit.solvers.frames import as_taps
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth

BLOCKS = (16, 32)
"""Sides of blocks to try."""


class TwoRound(Attack):
    """Solves for two-round block masks of square weights from ``w~`` and the public weight alone."""

    name = "two-round"
    knows = frozenset({"base"})
    tries = (
        "As sparse-frame, for masks of two rounds: uneven entries give a start, groups with low rank between them give "
        "the blocks of both rounds, and least squares over all four gives the private change. Square weights only."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> Framed:
        """Of the newest call of the smallest square product, of all under full effort.

        Raises:
            NotApplicable: There is no square weight: groups show on masks that the weight determines in full.
        """
        square = [pair for pair in targets(view, knowledge, "full") if pair[0].w.shape[0] == pair[0].w.shape[1]]
        if not square:
            raise NotApplicable("no weight in this transcript has as many outputs as inputs")
        chosen = square[:1] if effort == "quick" else square
        guesses = [luckiest(view, call, candidates, undo) for call, candidates in chosen]
        return Framed(guesses, DRIFTS if effort == "full" else ())

    def score(self, recovered: Framed, view: View, truth: Truth) -> Outcome:
        """Delta error; how well blocks and masks were recovered; over drift under full effort."""
        figures = basecase.delta_figures(recovered.guesses, truth) + mask_figures(recovered.guesses, truth)
        curve = None
        if recovered.drifts:
            curve = basecase.drift_curve(self.name, undo, recovered.guesses[0], truth, recovered.drifts)
        return Outcome(figures=figures, curves=[] if curve is None else [curve])

    def control(self) -> Control:
        """Two rounds of blocks of 16 at width 128, 0.5% drift."""
        evidence = basecase.record(single(128), drift=0.005, steps=TRIES, lr=1e-6, masks=small_mix(16, rounds=2))
        return Control(
            evidence, "delta error", 0.65, "ours: √((d+m)(s−1)/(dm)) gives 0.48; blocks of 32 at width 384 give 0.40"
        )


def undo(call: Call, candidates: Mapping[str, Tensor]) -> FrameGuess:
    """Solve for the masks of one call."""
    name, start = begin(call.w, candidates)
    masked, base = as_taps(call.w), as_taps(candidates[name])
    blocks = tuple(block for block in BLOCKS if 4 * block <= len(masked)) or (len(masked) // 4,)
    solution = blockwise.choose_block(
        lambda block: blockwise.solve_two_rounds(masked, base, start, block), masked.shape, blocks, 2
    )
    return guess(call, candidates, name, solution)

"""Consensus over steps: fresh masks at every step hide other parts of one private change, so steps are solved jointly.

Each step's masks are solved as in `sparse_frame` against the public weight; steps that clearly failed are dropped,
which the attacker sees; then all are refitted to a reference, and the reference is their mean, a few times over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tempo.audit.attack import Attack, Control, Effort, Figure, NotApplicable, Outcome
from tempo.audit.attacks.sparse_frame import FrameGuess, held, single, targets, undo
from tempo.audit.controls import basecase
from tempo.audit.controls.basecase import Guess
from tempo.audit.controls.weak import small_mix
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers import blockwise, frames
from tempo.audit.solvers.frames import as_taps
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth

STEPS = {"quick": 4, "full": 16}
"""Calls with masks of their own that are joined."""

ROUNDS = 8
"""Times that the reference is refitted."""

SPREAD = 1.5
"""Steps with a residual beyond this many times the least are dropped."""


@dataclass(frozen=True)
class Joined:
    """What all steps say together, beside what the last says alone."""

    together: list[Guess]
    alone: list[FrameGuess]
    steps: int


class Consensus(Attack):
    """Joins one product's calls under fresh masks."""

    name = "consensus"
    knows = frozenset({"base"})
    tries = (
        "Solves for the masks of several steps by sparse-frame, then refits all to their common mean: fresh masks hide "
        "another part of the same private change in every step, so that together they hide little of it."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> Joined:
        """Of the smallest product that has calls under several masks.

        Raises:
            NotApplicable: No product was masked twice.
        """
        for call, candidates in targets(view, knowledge, "full"):
            calls = list({each.weight: each for each in view.of(call.layer)}.values())[-STEPS[effort] :]
            if len(calls) > 1:
                together, alone, used = join(calls, candidates)
                return Joined([together], [alone], used)
        raise NotApplicable("no product was used under two different masks")

    def score(self, recovered: Joined, view: View, truth: Truth) -> Outcome:
        """Delta error of the newest weight, from all steps; and from the newest alone."""
        alone = basecase.delta_figures(recovered.alone, truth)[0]
        return Outcome(
            figures=[
                *basecase.delta_figures(recovered.together, truth),
                Figure(
                    name="delta error, newest step alone",
                    value=alone.value,
                    higher_leaks=False,
                    chance=1.0,
                    ceiling=0.0,
                    meaning="what sparse-frame makes of one step",
                ),
                Figure(name="steps joined", value=recovered.steps, meaning="steps whose masks were found"),
            ]
        )

    def control(self) -> Control:
        """Blocks of 16, four steps."""
        evidence = basecase.record(single(96), drift=0.02, steps=4, lr=1e-6, masks=small_mix(16))
        return Control(
            evidence,
            "delta error",
            0.15,
            "measured before: 0.20 → 0.02 with four steps at width 384; at 96 one step alone leaves 0.39",
        )


def join(calls: list[Call], candidates: Mapping[str, Tensor]) -> tuple[Guess, FrameGuess, int]:
    """The guess of the newest call from all, the same from it alone, and how many steps agreed."""
    newest = undo(calls[-1], candidates)
    base, block = as_taps(newest.base), len(newest.solution.a) // (int(newest.solution.columns.max()) + 1)
    solved = [(as_taps(calls[-1].w), newest.solution)]
    for call in calls[:-1]:
        masked = as_taps(call.w)
        solved.append((masked, blockwise.solve_one_round(masked, base, frames.start(masked, base), block)))
    least = min(solution.residual for _, solution in solved)
    kept = [(masked, solution) for masked, solution in solved if solution.residual <= SPREAD * least]
    reference = base
    for _ in range(ROUNDS):
        kept = [(masked, blockwise.refit(masked, reference, *found.structures, 0, 4)) for masked, found in kept]
        reference = torch.stack(
            [torch.where(held(found)[:, None, None], found.w, reference) for _, found in kept]
        ).mean(0)
    together = Guess(newest.call, candidates, newest.name, reference.view_as(newest.base))
    return together, newest, len(kept)

"""Robust principal components against cloaks: sparse frames matched in a band, and a low-rank rest taken off.

A cloak inside the spectrum of ``W`` cannot be cut off, and it turns singular vectors; but only into those of near
singular values. So the frame is sought in a band around the diagonal instead of on it, and the masks' least squares
alternate with taking the leading directions of the rest for the cloak: low rank plus a structured part.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tempo.audit.attack import Attack, Control, Effort, NotApplicable, Outcome
from tempo.audit.attacks.sparse_frame import Framed, FrameGuess, begin, mask_figures, one_round, single, targets
from tempo.audit.controls import basecase
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers import frames
from tempo.audit.solvers.frames import Start
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth
from tempo.schemes.mix import Mix
from tempo.schemes.mixing import LEAST_CLOAK

WIDTHS: dict[Effort, tuple[float, ...]] = {"quick": (0.03,), "full": (0.01, 0.03, 0.1)}
"""How far singular vectors may have moved, beside the root mean square singular value."""

LARGEST: dict[Effort, int] = {"quick": 256, "full": 512}
"""Most features on a side: a band costs a few hundred products of such matrices."""


class RobustPCA(Attack):
    """Solves for one-round masks under a cloak."""

    name = "robust-pca"
    knows = frozenset({"base"})
    tries = (
        "As sparse-frame, against cloaks: singular vectors may have moved among those of near singular values, and "
        "what the masks leave over is split into a cloak of low rank and the private change."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> Framed:
        """Of the newest call of the smallest product, of all under full effort.

        Raises:
            NotApplicable: All are too large.
        """
        found = [
            pair
            for pair in targets(view, knowledge, "full")
            if min(pair[0].w.shape[:2]) > 2 * LEAST_CLOAK and max(pair[0].w.shape[:2]) <= LARGEST[effort]
        ]
        if not found:
            raise NotApplicable(f"no product has between {2 * LEAST_CLOAK} and {LARGEST[effort]} features on each side")
        return Framed([undo(*pair, WIDTHS[effort]) for pair in (found[:1] if effort == "quick" else found)])

    def score(self, recovered: Framed, view: View, truth: Truth) -> Outcome:
        """Delta error; how well blocks and masks were recovered."""
        figures = basecase.delta_figures(recovered.guesses, truth) + mask_figures(recovered.guesses, truth)
        return Outcome(figures=figures)

    def control(self) -> Control:
        """Blocks of 8 in one round, under a cloak of rank 16 at half the strength of `mix-tuned`'s."""
        masks = Mix(8, rounds=1, cloak=LEAST_CLOAK, cloak_strength=0.5, insecure_small_blocks=True)
        evidence = basecase.record(single(128), drift=0.05, masks=masks)
        return Control(evidence, "delta error", 0.8, "ours: one round falls under a cloak too, 0.4 at width 384")


def undo(call: Call, candidates: Mapping[str, Tensor], widths: tuple[float, ...]) -> FrameGuess:
    """Solve for the masks of one call, in bands of several widths; of these, the guess of least apparent drift."""
    guesses = []
    for width in widths:

        def banded(masked: Tensor, base: Tensor, width: float = width) -> Start:
            return frames.start(masked, base, width)

        name, start = begin(call.w, candidates, banded)
        guesses.append(one_round(call, candidates, name, start, LEAST_CLOAK))
    return min(guesses, key=lambda guess: guess.solution.residual)

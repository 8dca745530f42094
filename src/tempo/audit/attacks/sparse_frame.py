"""Sparse frames: block masks between the singular vectors of a masked and of a public weight, found by their sparsity.

The strongest known attack on one round of mixing: weights of one call suffice. `tempo.audit.solvers.frames` finds a
start, `tempo.audit.solvers.blockwise` the blocks and the least-squares masks. What remains of the private change is
what the masks' own freedom does not hide: of an m×d weight under blocks of side s, delta error √((d+m)(s−1)/(2dm)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from tempo.audit.attack import Attack, Control, Effort, Figure, NotApplicable, Outcome
from tempo.audit.controls import basecase
from tempo.audit.controls.basecase import Guess
from tempo.audit.controls.weak import small_mix
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers import blockwise, frames
from tempo.audit.solvers.blockwise import Solution
from tempo.audit.solvers.frames import Start, as_taps
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth
from tempo.schemes.masks import Mask

BLOCKS = (4, 8, 16, 32, 64)
"""Sides of blocks to try; the one that explains the public weight best for its freedom is taken."""

QUICK_PRODUCTS = 2
"""Products that a quick audit attacks: the smallest, whose masks have most freedom beside the weight's the least."""

LARGEST = 1024
"""Most features on a side: the work grows with their cube."""

TRIES = 3
"""Calls to attack at the most: one in fifteen to forty fails."""

SOLVED = 0.03
"""A guess that is no further from the public weight than this, relatively, needs no second; wrong ones were at 0.08."""

DRIFTS = (0.005, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class FrameGuess(Guess):
    """A guess with the masks that made it."""

    solution: Solution = field(kw_only=True, repr=False)


@dataclass(frozen=True)
class Framed:
    """Guesses, and whether to vary the drift."""

    guesses: list[FrameGuess]
    drifts: tuple[float, ...] = ()


class SparseFrame(Attack):
    """Solves for one-round block masks from ``w~`` and the public weight alone."""

    name = "sparse-frame"
    knows = frozenset({"base"})
    tries = (
        "Aligns the singular vectors of the masked weight with the public one's, up to unknown signs; the right signs "
        "make both masks sparse. Then finds the blocks and solves for them by least squares: what remains beside the "
        "public weight is the private change. Layers that share an input are attacked together."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> Framed:
        """Of the newest call of some products, of all under full effort."""
        guesses = [luckiest(view, call, candidates, undo) for call, candidates in targets(view, knowledge, effort)]
        return Framed(guesses, DRIFTS if effort == "full" else ())

    def score(self, recovered: Framed, view: View, truth: Truth) -> Outcome:
        """Delta error; how well blocks and masks were recovered; over drift under full effort."""
        figures = basecase.delta_figures(recovered.guesses, truth) + mask_figures(recovered.guesses, truth)
        curve = None
        if recovered.drifts:
            curve = basecase.drift_curve(self.name, undo, recovered.guesses[0], truth, recovered.drifts)
        return Outcome(figures=figures, curves=[] if curve is None else [curve])

    def control(self) -> Control:
        """Blocks of 4 at 0.5% drift."""
        evidence = basecase.record(single(128), drift=0.005, steps=TRIES, lr=1e-6, masks=small_mix(4))
        return Control(
            evidence,
            "delta error",
            0.2,
            "measured before: 0.09 at width 384 with blocks of 4 and 0.5% drift; √((d+m)(s−1)/(2dm)) gives 0.15 at 128",
        )


def single(width: int, outputs: int | None = None, seed: int = 0) -> nn.Module:
    """One linear layer at its random start, the base of controls."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, outputs or width, bias=False))


def targets(view: View, knowledge: Knowledge, effort: Effort) -> list[tuple[Call, Mapping[str, Tensor]]]:
    """The newest calls of the products to attack, smallest first, with the public weights they may come from.

    Raises:
        NotApplicable: There is none of a size that can be attacked.
    """
    found = [pair for pair in basecase.newest(view, knowledge) if max(pair[0].w.shape[:2]) <= LARGEST]
    if not found:
        raise NotApplicable(f"every product that may come from a public weight has more than {LARGEST} features")
    found.sort(key=lambda pair: pair[0].w.numel())
    return found[:QUICK_PRODUCTS] if effort == "quick" else found


def likely(masked: Tensor, candidates: Mapping[str, Tensor]) -> list[str]:
    """The public weights whose singular values are nearest: orthogonal masks keep them, and so does transposing."""

    def values(w: Tensor) -> Tensor:
        found = torch.linalg.svdvals(w.double().flatten(1))
        scaled: Tensor = found / found.norm()
        return scaled

    ours = values(masked)

    def distance(name: str) -> float:
        theirs = values(candidates[name])
        count = min(len(ours), len(theirs))
        return float((ours[:count] - theirs[:count]).norm())

    distances = {name: distance(name) for name in candidates}
    nearest = min(distances.values())
    return [name for name, found in distances.items() if found <= 1.01 * nearest + 1e-6]


def begin(
    masked: Tensor, candidates: Mapping[str, Tensor], first: Callable[[Tensor, Tensor], Start] = frames.start
) -> tuple[str, Start]:
    """The public weight that a masked one comes from, and a start: of the likely ones the one that looks sparsest.

    Args:
        masked: ``w~``.
        candidates: Public weights by name.
        first: Makes a start of ``w~`` and a public weight, by taps.
    """
    starts = {name: first(as_taps(masked), as_taps(candidates[name])) for name in likely(masked, candidates)}
    name = max(starts, key=lambda each: starts[each].sparsity)
    return name, starts[name]


def luckiest(
    view: View,
    newest: Call,
    candidates: Mapping[str, Tensor],
    undo: Callable[[Call, Mapping[str, Tensor]], FrameGuess],
) -> FrameGuess:
    """Solve for the masks of one call, or of one before it where that does not give in: masks are of different luck."""
    best = undo(newest, candidates)
    others = {call.weight: call for call in view.of(newest.layer) if call.weight != newest.weight}
    for call in list(others.values())[-TRIES + 1 :]:
        if best.solution.residual < SOLVED:
            break
        best = min(best, undo(call, candidates), key=lambda found: found.solution.residual)
    return best


def undo(call: Call, candidates: Mapping[str, Tensor]) -> FrameGuess:
    """Solve for the masks of one call."""
    name, start = begin(call.w, candidates)
    return one_round(call, candidates, name, start)


def one_round(call: Call, candidates: Mapping[str, Tensor], name: str, start: Start, cloak: int = 0) -> FrameGuess:
    """The guess that one-round masks of the likeliest block size give, from a start; less a cloak of some rank."""
    masked, base = as_taps(call.w), as_taps(candidates[name])
    solution = blockwise.choose_block(
        lambda block: blockwise.solve_one_round(masked, base, start, block, cloak=cloak),
        masked.shape,
        plausible(start, masked),
        1,
    )
    return guess(call, candidates, name, solution)


def guess(call: Call, candidates: Mapping[str, Tensor], name: str, solution: Solution) -> FrameGuess:
    """Of a solution; rows that this worker does not hold stay public."""
    public = candidates[name].double()
    w = torch.where(held(solution)[:, None, None], solution.w, as_taps(public)).view_as(public)
    return FrameGuess(call, candidates, name, w, solution=solution)


def held(solution: Solution) -> Tensor:
    """Rows of the public weight that the masks reach."""
    reached: Tensor = solution.p.square().sum(0) > 0.5
    return reached


def plausible(start: Start, masked: Tensor) -> tuple[int, ...]:
    """Block sizes that fit how sparse the start is: noise makes it look denser, never sparser."""
    smallest_side = min(masked.shape[:2])
    sizes = [block for block in BLOCKS if 2 * block <= smallest_side] or [BLOCKS[0]]
    densest = 1.5 * (max(masked.shape[:2]) / max(start.sparsity, 1.0) + 2)
    return tuple(block for block in sizes if block <= densest) or tuple(sizes[:1])


def mask_figures(guesses: Sequence[FrameGuess], truth: Truth) -> list[Figure]:
    """Purity of the recovered blocks and correlation with the true masks, of the product that leaks most by each."""
    purities, correlations = [], []
    for each in guesses:
        behind = truth.of(each.call)
        if behind.mask("A").blocks:
            purities.append(purity(each.solution.columns, block_of_rows(behind.mask("A"))))
        correlations.append(row_correlation(each.solution.a, behind.matrix("A")))
    figures = [
        Figure(
            name="row correlation",
            value=max(correlations),
            chance=0.0,
            ceiling=1.0,
            meaning="mean cosine between rows of the estimated and of the true mask A",
        )
    ]
    if purities:
        figures.append(
            Figure(
                name="purity of blocks",
                value=max(purities),
                ceiling=1.0,
                meaning="share of masked input features put with those that they share a block with",
            )
        )
    return figures


def row_correlation(estimate: Tensor, true: Tensor) -> float:
    """Mean cosine between rows; both masks may have the other sign."""
    return abs(float(nn.functional.cosine_similarity(estimate, true, dim=1).mean()))


def block_of_rows(mask: Mask) -> np.ndarray:
    """Number of the block that each masked feature comes out of, in the last round."""
    sides = [side for batch in mask.blocks[-1].batches for side in [batch.shape[1]] * len(batch)]
    slots = np.repeat(np.arange(len(sides)), sides)
    found: np.ndarray = slots[mask.gathers[-1].index.long().numpy()]
    return found


def purity(found: np.ndarray, true: np.ndarray) -> float:
    """Share of items in the right group, groups matched so that it is largest."""
    table = np.zeros((int(found.max()) + 1, int(true.max()) + 1))
    np.add.at(table, (found, true), 1)
    rows, columns = linear_sum_assignment(-table)
    return float(table[rows, columns].sum() / len(found))

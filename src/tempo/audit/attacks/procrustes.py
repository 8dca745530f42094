"""Orthogonal Procrustes with a known base and known data: ``A`` from second moments of weights and of inputs.

Orthogonal masks of the other axis cancel in second moments: ``w~ᵀ w~ = A (Wᵀ W) Aᵀ`` and ``x~ᵀ x~ = A (Xᵀ X) Aᵀ``,
however rows are mixed and however often features are. The base checkpoint gives about ``Wᵀ W``, the base run on data
of the same distribution about ``Xᵀ X``: two symmetric matrices turned by one secret rotation. Eigenvectors of either
give it up to signs, the other one has the signs; then the Procrustes problem (Schönemann 1966) of both is solved in
steps, each moment weighted by how well it fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tempo.audit.attack import Attack, Control, Effort, Evidence, Figure, NotApplicable, Outcome
from tempo.audit.attacks.signatures import sign, taps
from tempo.audit.attacks.singular_vectors import polar
from tempo.audit.controls import basecase
from tempo.audit.controls.basecase import Guess
from tempo.audit.controls.toys import correlated_features
from tempo.audit.controls.weak import FeaturesReused
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers.reference import plain_inputs
from tempo.audit.solvers.unmixing import flat
from tempo.audit.transcript import View
from tempo.audit.truth import Truth

WIDTH: dict[Effort, int] = {"quick": 256, "full": 1024}
"""Input features of the widest product that is attacked."""

SWEEPS = 80
ROUND = 20
"""Sweeps between two weightings."""

LEAKS = 0.5


@dataclass(frozen=True)
class Turned:
    """An estimate of ``A``, and of the weight under it."""

    guess: Guess
    A: Tensor


class Procrustes(Attack):
    """Finds the rotation that takes known second moments of weights and inputs to the masked ones."""

    name = "procrustes"
    knows = frozenset({"architecture", "base", "data"})
    tries = (
        "Computes second moments of each product's weight from the public checkpoint, and of its inputs by running "
        "that checkpoint on data like the victim's, and finds the rotation of features that takes both to the masked "
        "ones; rows may be mixed in any way, and features in any orthogonal one."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Turned]:
        """Of the newest weight of every product that is not too wide."""
        known = plain_inputs(view, knowledge)
        names = knowledge.names(view)
        found = []
        for layer, inputs in known.items():
            calls = view.of(layer)
            call = calls[-1]
            public = knowledge.base_weight(names[layer], tuple(call.w.shape))
            if public is None or public.shape != call.w.shape or public.shape[1] > WIDTH[effort]:
                continue
            masked, base = taps(call.w.double()), taps(public)
            rows = torch.cat([flat(each.x) for each in calls if each.weight == call.weight])
            x = flat(inputs)
            if x.shape[1] != base.shape[1]:
                continue  # grouped channels
            moments = [(_moment(masked), _moment(base)), (rows.T @ rows / len(rows), x.T @ x / len(x))]
            A = rotation(*zip(*moments, strict=True))
            P = polar(torch.einsum("iak,ba,jbk->ij", masked, A.T, base))
            name = " + ".join(names[layer])
            w = torch.einsum("ji,jbk,ba->iak", P, masked, A).view_as(public)
            found.append(Turned(Guess(call, {name: public}, name, w), A))
        if not found:
            raise NotApplicable(f"no product of at most {WIDTH[effort]} features has a public weight and known inputs")
        return found

    def score(self, recovered: list[Turned], view: View, truth: Truth) -> Outcome:
        """Cosine between rows of the estimate and of ``A``, whose sign as a whole is free; then the delta error."""
        likeness = []
        for turned in recovered:
            A = truth.of(turned.guess.call).matrix("A")
            likeness.append(abs(float(nn.functional.cosine_similarity(turned.A, A).mean())))
        likeness.sort()
        figures = [
            Figure(
                name="row correlation of A",
                value=likeness[-1],
                leaks=LEAKS,
                chance=0.0,
                ceiling=1.0,
                meaning="mean cosine between rows of the estimated and the true mask of features, of the product where "
                "it works best: at 1, masked inputs are known up to the mixing of their rows",
            ),
            Figure(
                name="row correlation of A, median of products",
                value=likeness[len(likeness) // 2],
                chance=0.0,
                ceiling=1.0,
                meaning="half of the products leak at least this much",
            ),
        ]
        with suppress(NotApplicable):  # a base that never moved has no private change, but still a mask
            figures += basecase.delta_figures([turned.guess for turned in recovered], truth)
        return Outcome(figures=figures)

    def control(self) -> Control:
        """Dense rotations of features, rows in order, inputs of a known distribution, 2% drift."""
        return Control(
            evidence=correlated(0.02, masks=FeaturesReused(48)),
            figure="row correlation of A",
            bound=0.8,
            source="earlier measured with base and data, dense A: 0.99 / 0.89 / 0.61 at 0.5 / 2 / 5% drift",
        )


def correlated(drift: float, width: int = 48, rows: int = 2048, **fields: Any) -> Evidence:
    """A network on features with common causes, as hidden layers have; half of ``rows`` are the victim's."""
    inputs = correlated_features(2 * rows, width, torch.Generator().manual_seed(3)).float()
    return basecase.record(basecase.network(width, 2 * width, width), drift, inputs=inputs, **fields)


def rotation(masked: Sequence[Tensor], public: Sequence[Tensor]) -> Tensor:
    """The orthogonal ``A``, or ``−A``, with ``masked[k] ≈ A public[k] Aᵀ`` for all ``k``; each d×d, symmetric, ≥ 0."""
    ours, theirs = (torch.stack([_levelled(moment) for moment in moments]) for moments in (masked, public))
    starts = []
    for share in (0.0, 0.5, 1.0):
        here, there = (
            torch.linalg.eigh((1 - share) * moments[0] + share * moments[-1]).eigenvectors for moments in (ours, theirs)
        )
        starts.append((here * _signs(here.T @ ours @ here, there.T @ theirs @ there)) @ there.T)
    A: Tensor = min(starts, key=lambda each: float(_misfits(each, ours, theirs).sum()))
    for sweep in range(SWEEPS):
        if sweep % ROUND == 0:
            weights = 1 / _misfits(A, ours, theirs).clamp_min(1e-12)
        A = polar(torch.einsum("k,kab->ab", weights / weights.max(), ours @ A @ theirs))
    return A


def _misfits(A: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared distance of each masked moment from the turned public one."""
    squared: Tensor = (A.T @ ours @ A - theirs).square().sum((1, 2))
    return squared


def _moment(w: Tensor) -> Tensor:
    """Second moment of input features, d×d, of a weight m×d×taps."""
    return torch.einsum("iak,ibk->ab", w, w)


def _levelled(moment: Tensor) -> Tensor:
    """The square root, which turns with it, of unit norm: weaker directions count too."""
    values, vectors = torch.linalg.eigh(moment)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    level: Tensor = root / root.norm()
    return level


def _signs(ours: Tensor, theirs: Tensor) -> Tensor:
    """Signs of basis vectors under which both sides of each pair (k×d×d each) agree best off the diagonal."""
    scale = (ours.square() + theirs.square()).sum((0, 2)).clamp_min(1e-300).rsqrt()
    agreement = ((ours * theirs).sum(0) * scale * scale[:, None]).fill_diagonal_(0.0)
    signs = sign(torch.linalg.eigh(agreement).eigenvectors[:, -1])
    for _ in range(50):
        signs = sign(agreement @ signs)
    return signs

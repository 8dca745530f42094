"""Singular vectors of ``w~`` laid on those of the public weight, by order of singular values; signs are free.

Fine-tuning hardly turns singular vectors, and orthogonal masks turn each weight's as a whole: ``w~ = P W Aᵀ`` has the
singular vectors ``P U`` and ``A V``. What that gives depends on what else is known of a mask:

* A permuted axis: rows of ``|Ũ|`` match those of ``|U₀|``, as absolute values have no sign.
* One axis permuted, the other rotated: the rotation follows by orthogonal Procrustes (Schönemann 1966).
* Both rotated: signs cancel, ``Ŵ = U₀ S̃ V₀ᵀ``, and only singular values are learned from a matrix. A convolution has
  one matrix for each tap of its kernel, all under the same two masks: their cores ``Ũᵀ w~ Ṽ`` (De Lathauwer et al., *A
  multilinear singular value decomposition*, 2000) show the signs, and so both masks, whatever their blocks and rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tempo.audit.attack import Attack, Control, Effort, Outcome
from tempo.audit.attacks.signatures import (
    FULL_DRIFTS,
    QUICK_DRIFTS,
    agreeing,
    assign,
    balanced,
    fit_scales,
    refine,
    taps,
)
from tempo.audit.controls import basecase
from tempo.audit.controls.basecase import Guess
from tempo.audit.controls.weak import InputsMixed
from tempo.audit.knowledge import Knowledge
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth

FOUND = 0.3
"""Apparent drift from which on a match counts as wrong; a wrong one shows 1 or more."""

SWEEPS = 40
"""Of Procrustes on each side in turn, without and again with a cloak."""

LEAST_CLOAK = 8
"""Rank of the smallest cloak that is looked for: a private change of smaller rank would be taken for one."""

STEP = 1.25
"""Ratio of two neighbouring singular values that ends a cloak's; a change alone stays below 1.1."""


@dataclass(frozen=True)
class Aligned:
    """Guesses, and how far to vary the drift."""

    guesses: list[Guess]
    drifts: tuple[float, ...]


class SingularVectors(Attack):
    """Aligns singular vectors of the masked weight with the public one's, then solves for what the mask leaves open."""

    name = "singular-vectors"
    knows = frozenset({"base"})
    tries = (
        "Lays singular vectors of the masked weight on those of the public one, in order of singular values: that "
        "undoes permutations, a rotation of one axis, and rotations of both axes of a spatial convolution, whose taps "
        "share them; of a matrix rotated on both sides it learns singular values only."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> Aligned:
        """Of the newest call of every product."""
        guesses = [undo(call, candidates) for call, candidates in basecase.newest(view, knowledge)]
        return Aligned(guesses, QUICK_DRIFTS if effort == "quick" else FULL_DRIFTS)

    def score(self, recovered: Aligned, view: View, truth: Truth) -> Outcome:
        """Delta error, shares of correct assignments; a curve over drift of the product matched best."""
        figures = basecase.delta_figures(recovered.guesses, truth)
        figures += basecase.assignment_figures(recovered.guesses, truth)
        closest = min(recovered.guesses, key=lambda guess: basecase.scored(guess, truth).error or float("inf"))
        curve = basecase.drift_curve(self.name, undo, closest, truth, recovered.drifts)
        return Outcome(figures=figures, curves=[] if curve is None else [curve])

    def control(self) -> Control:
        """A dense rotation of 48 inputs; 192 outputs permuted and scaled; 2% drift."""
        return Control(
            evidence=basecase.record(basecase.network(48, 192, 48), drift=0.02, masks=InputsMixed(48)),
            figure="delta error",
            bound=0.45,
            source="what looks like a rotation or scale stays unknown: sqrt((d-1)/2m + 1/d) = 0.38 of the change",
        )


def undo(call: Call, candidates: Mapping[str, Tensor]) -> Guess:
    """Try the public weights of nearest singular values, from the least to the most that a mask may do."""
    masked = taps(call.w.double())
    spectrum = torch.linalg.svdvals(masked.flatten(1))

    def distance(name: str) -> float:
        return float((torch.linalg.svdvals(taps(candidates[name]).flatten(1))[: len(spectrum)] - spectrum).norm())

    # Under scales singular values tell little, so two are tried; under rotations the first is right.
    likely = sorted(candidates, key=distance)[:2]
    for name in likely:
        for guess in _lines_matched(call, candidates, name, masked):
            if guess.drift < FOUND:
                return guess
    return basecase.best([_both_rotated(call, candidates, name, masked) for name in likely])


def _lines_matched(call: Call, candidates: Mapping[str, Tensor], name: str, masked: Tensor) -> Iterator[Guess]:
    """Guesses with at least one axis permuted."""
    public, shape = taps(candidates[name]), candidates[name].shape
    ours, theirs = balanced(masked), balanced(public)
    columns = match_lines(ours.transpose(0, 1), theirs.transpose(0, 1))
    rows, columns = refine(ours, public, match_lines(ours, theirs), columns)
    row_scales, column_scales = fit_scales(masked, public[rows][:, columns])
    w = public.clone()
    w[rows[:, None], columns] = masked / (row_scales[:, None] * column_scales)[..., None]
    yield Guess(call, candidates, name, w.reshape(shape), rows, columns)
    for axis in (0, 1):
        ours, theirs = masked.transpose(0, axis), public.transpose(0, axis)
        # A rotation of as many columns as lines fits any; one of columns that another operator holds in part, none.
        if ours.shape[0] * ours.shape[2] > ours.shape[1] == theirs.shape[1]:
            w, lines = one_rotated(ours, theirs)
            rotated = w.transpose(0, axis).reshape(shape)
            yield Guess(call, candidates, name, rotated, None if axis else lines, lines if axis else None)


def match_lines(ours: Tensor, public: Tensor) -> Tensor:
    """For each row of ``ours`` the public one with the same absolute entries in left singular vectors."""
    (here, weight), (there, _) = (_left(functional.normalize(w.flatten(1), dim=1)) for w in (ours, public))
    count = min(ours.flatten(1).shape[1], len(ours))
    return assign(-torch.cdist(here[:, :count].abs() * weight[:count], there[:, :count].abs() * weight[:count]))


def one_rotated(masked: Tensor, public: Tensor) -> tuple[Tensor, Tensor]:
    """``Ŵ`` and its rows, with rows permuted and scaled, columns rotated: assignment and Procrustes in turn."""
    lines = match_lines(masked, public)
    scaled = masked / masked.flatten(1).norm(dim=1).clamp_min(1e-300)[:, None, None]
    unit = public / public.flatten(1).norm(dim=1).clamp_min(1e-300)[:, None, None]
    for _ in range(SWEEPS):
        rotated = torch.einsum("ab,ibk->iak", polar(torch.einsum("iak,ibk->ab", unit[lines], scaled)), scaled)
        before, lines = lines, assign(rotated.flatten(1) @ unit.flatten(1).T)
        if torch.equal(lines, before):
            break
    w = public.clone()
    w[lines] = rotated * public[lines].flatten(1).norm(dim=1)[:, None, None]
    return w, lines


def _both_rotated(call: Call, candidates: Mapping[str, Tensor], name: str, masked: Tensor) -> Guess:
    """As if both axes were rotated."""
    w = both_rotated(masked, taps(candidates[name])[: len(masked)])
    whole = taps(candidates[name]).clone()
    whole[: len(w)] = w
    return Guess(call, candidates, name, whole.reshape(candidates[name].shape))


def both_rotated(masked: Tensor, public: Tensor) -> Tensor:
    """``Ŵ = Pᵀ (w~ − cloak) A`` for the rotations that bring ``w~`` closest to the public weight (m×d×taps)."""
    P, A, cloak = rotations(masked, public)
    return torch.einsum("ji,jbk,ba->iak", P, masked - cloak, A)


def rotations(masked: Tensor, public: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthogonal ``P`` (m×m) and ``A`` (d×d), and a cloak of low rank, with ``masked ≈ P public Aᵀ + cloak``.

    With one tap there is no telling: ``P`` and ``A`` then lay singular vectors on one another with any signs.
    """
    ours, theirs = ([_left(w.transpose(0, axis).flatten(1))[0] for axis in (0, 1)] for w in (masked, public))
    core, public_core = (
        torch.einsum("ia,ijk,jb->abk", left, w, right) for w, (left, right) in ((masked, ours), (public, theirs))
    )
    signs = agreeing((core * public_core).sum(2))
    P, A = ((mine * sign) @ other.T for mine, other, sign in zip(ours, theirs, signs, strict=True))
    cloak, rank = torch.zeros_like(masked), 0
    if masked.shape[2] == 1:
        return P, A, cloak
    for sweep in range(2 * SWEEPS):
        covered = masked - cloak
        P = polar(torch.einsum("iak,jak->ij", covered, torch.einsum("iak,ba->ibk", public, A)))
        A = polar(torch.einsum("iak,ibk->ab", covered, torch.einsum("ij,jak->iak", P, public)))
        if sweep >= SWEEPS:
            remainder = masked - torch.einsum("ij,jbk,ab->iak", P, public, A)
            left, values = _left(remainder.flatten(1))
            rank = rank or _standing_out(values)
            if not rank:
                break
            cloak = (left[:, :rank] @ (left[:, :rank].T @ remainder.flatten(1))).view_as(masked)
    return P, A, cloak


def _standing_out(values: Tensor) -> int:
    """How many singular values stand out as a cloak's do, by a step between them; 0 for none."""
    first, last = LEAST_CLOAK - 1, len(values) // 2
    if last <= first:
        return 0
    steps = values[first:last] / values[first + 1 : last + 1].clamp_min(1e-300)
    return LEAST_CLOAK + int(steps.argmax()) if float(steps.max()) > STEP else 0


def _left(lines: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors, and singular values, the largest first; from the small Gram matrix."""
    values, vectors = torch.linalg.eigh(lines @ lines.T)
    return vectors.flip(1), values.flip(0).clamp_min(0).sqrt()


def polar(m: Tensor) -> Tensor:
    """The orthogonal matrix nearest to ``m``."""
    u, _, vh = torch.linalg.svd(m)
    nearest: Tensor = u @ vh
    return nearest

"""Directions of weight vectors against a public checkpoint, in the manner of ArrowMatch.

Wang et al., *Game of Arrows: On the (In-)Security of Weight Obfuscation for On-Device TEE-Shielded LLM Partition
Algorithms* (USENIX Security 2025): permutations and scales leave the direction of a weight vector as it is, and
fine-tuning hardly turns it, so that vectors are recognised by the cosine with public ones. Where the other axis is
masked too, cosines *between* the vectors of one weight take the place of directions: no rotation or permutation of
the other axis changes them.
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
    PROBES,
    QUANTILES,
    QUICK_DRIFTS,
    assign,
    balanced,
    fit_scales,
    taps,
)
from tempo.audit.controls import basecase
from tempo.audit.controls.basecase import Guess
from tempo.audit.knowledge import Knowledge
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth

FOUND = 0.3
"""Apparent drift from which on a match counts as wrong and the next way is tried; a wrong one shows 1 or more."""


@dataclass(frozen=True)
class Matched:
    """Guesses, and how far to vary the drift."""

    guesses: list[Guess]
    drifts: tuple[float, ...]


class Directions(Attack):
    """Matches weight vectors by their directions, seen through their cosines with one another."""

    name = "directions"
    knows = frozenset({"base"})
    tries = (
        "Recognises the vectors of the public weight by directions: first one axis, by cosines between its vectors, "
        "which neither rotating nor permuting the other axis changes; then the other axis, vector by vector where it "
        "is permuted and scaled, by the best rotation where it is mixed (ArrowMatch, USENIX Security 2025)."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> Matched:
        """Of the newest call of every product."""
        guesses = [undo(call, candidates) for call, candidates in basecase.newest(view, knowledge)]
        return Matched(guesses, QUICK_DRIFTS if effort == "quick" else FULL_DRIFTS)

    def score(self, recovered: Matched, view: View, truth: Truth) -> Outcome:
        """Delta error, shares of correct assignments; a curve over drift of the product matched best."""
        figures = basecase.delta_figures(recovered.guesses, truth)
        figures += basecase.assignment_figures(recovered.guesses, truth)
        closest = min(recovered.guesses, key=lambda guess: basecase.scored(guess, truth).error or float("inf"))
        curve = basecase.drift_curve(self.name, undo, closest, truth, recovered.drifts)
        return Outcome(figures=figures, curves=[] if curve is None else [curve])

    def control(self) -> Control:
        """`tempo` at 5% drift."""
        return Control(
            evidence=basecase.record(basecase.network(), drift=0.05, scheme="tempo"),
            figure="rows and columns assigned correctly",
            bound=0.98,
            source="ArrowMatch recovers more than 98% of weights under five permuting and scaling schemes",
        )


def undo(call: Call, candidates: Mapping[str, Tensor]) -> Guess:
    """Try the likeliest public weights and each way to begin, until one fits."""
    masked = taps(call.w.double())
    profile = _profiles(_cosines(balanced(masked)))[:PROBES]

    def distance(name: str) -> float:
        return float(torch.cdist(profile, _profiles(_cosines(balanced(taps(candidates[name]))))).amin(1).mean())

    found = []
    for name in sorted(candidates, key=distance)[:2]:
        for guess in _ways(call, candidates, name, masked):
            found.append(guess)
            if guess.drift < FOUND:
                return guess
    return basecase.best(found)


def _ways(call: Call, candidates: Mapping[str, Tensor], name: str, masked: Tensor) -> Iterator[Guess]:
    """Guesses: each axis first, the other permuted and scaled, or rotated."""
    public = taps(candidates[name])
    shape = candidates[name].shape

    def guess(w: Tensor, rows: Tensor | None, columns: Tensor | None) -> Guess:
        return Guess(call, candidates, name, w.reshape(shape), rows, columns)

    lines = match_lines(balanced(masked), balanced(public))
    yield guess(*_permuted(masked, public, lines))
    for axis in (0, 1):
        ours, theirs = masked.transpose(0, axis), public.transpose(0, axis)
        if ours.shape[0] * ours.shape[2] <= ours.shape[1] or ours.shape[1] < theirs.shape[1]:
            continue  # a rotation of so many columns fits any lines; and one that another operator sees in part, none
        lines = match_lines(ours, theirs)
        w = _rotated(ours, theirs, lines).transpose(0, axis)
        yield guess(w, None if axis else lines, lines if axis else None)


def match_lines(ours: Tensor, public: Tensor) -> Tensor:
    """For each row of ``ours`` the public row with the same cosines to the other rows (m×d×taps, M×d×taps)."""
    here, there = _cosines(ours), _cosines(public)
    lines = assign(-torch.cdist(_profiles(here), _profiles(there)))
    for _ in range(30):
        before = lines
        lines = assign(here @ there[:, lines].T)
        if torch.equal(lines, before):
            break
    return lines


def _permuted(masked: Tensor, public: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``Ŵ``, rows and columns, as if columns were permuted and scaled."""
    ours, theirs = balanced(masked), balanced(public[rows])
    columns = assign(ours.transpose(0, 1).flatten(1) @ theirs.transpose(0, 1).flatten(1).T)
    row_scales, column_scales = fit_scales(masked, public[rows][:, columns])
    w = public.clone()
    w[rows[:, None], columns] = masked / (row_scales[:, None] * column_scales)[..., None]
    return w, rows, columns


def _rotated(masked: Tensor, public: Tensor, rows: Tensor) -> Tensor:
    """``Ŵ``, as if columns were rotated: the orthogonal Procrustes problem (Schönemann 1966)."""
    theirs = public[rows]
    scales = masked.flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1).clamp_min(1e-300)
    ours = masked / scales.clamp_min(1e-300)[:, None, None]
    u, _, vh = torch.linalg.svd(torch.einsum("iak,ibk->ab", theirs, ours))
    w = public.clone()
    w[rows] = torch.einsum("ab,ibk->iak", u @ vh, ours)
    return w


def _cosines(w: Tensor) -> Tensor:
    """Between rows, the diagonal left out."""
    lines = functional.normalize(w.flatten(1), dim=1)
    return (lines @ lines.T).fill_diagonal_(0.0)


def _profiles(cosines: Tensor) -> Tensor:
    """Each row's cosines in order, as quantiles."""
    values = cosines.sort(1).values[:, None]
    return functional.interpolate(values, QUANTILES, mode="linear", align_corners=True)[:, 0]

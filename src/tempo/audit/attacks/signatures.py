"""Row and column signatures against a public checkpoint: undoes permutations, scales and signs.

A signature of a row is a set of numbers that neither the order nor the scales of the columns change, and the other way
round; optimal assignment then matches masked with public ones, and scales follow from medians of log ratios. Where
lines may have changed their signs, magnitudes are matched, and signs follow. Closest published attack: Wang et al.,
*Game of Arrows* (USENIX Security 2025), see `directions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from tempo.audit.attack import Attack, Control, Effort, Outcome
from tempo.audit.controls import basecase
from tempo.audit.controls.basecase import Guess
from tempo.audit.knowledge import Knowledge
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth

QUICK_DRIFTS = (0.0, 0.01, 0.05, 0.1)
FULL_DRIFTS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1)
PROBES = 256
"""Rows that tell which public weight a masked one comes from, where there are several of its shape."""

QUANTILES = 128
"""Of each line, in its signature."""

SWEEPS = 40
"""Times that signs of rows and of columns are chosen in turn."""


@dataclass(frozen=True)
class Matched:
    """Guesses, and how far to vary the drift."""

    guesses: list[Guess]
    drifts: tuple[float, ...]


class Signatures(Attack):
    """Matches rows and columns of ``w~`` with those of the public weight by sorted values, then solves for scales."""

    name = "signatures"
    knows = frozenset({"base"})
    tries = (
        "Balances rows and columns of the masked and of the public weight, so that scales drop out, matches their "
        "sorted values or magnitudes by optimal assignment, then undoes permutations, scales and signs: what remains "
        "beside the public weight is the private change."
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
        curve = basecase.drift_curve("signatures", undo, closest, truth, recovered.drifts)
        return Outcome(figures=figures, curves=[] if curve is None else [curve])

    def control(self) -> Control:
        """`tempo` at 5% drift."""
        evidence = basecase.record(basecase.network(), drift=0.05, scheme="tempo")
        return Control(
            evidence=evidence,
            figure="rows and columns assigned correctly",
            bound=1.0,
            source="issue: `tempo`: both permutations 100% at ≤5% drift",
        )


def undo(call: Call, candidates: Mapping[str, Tensor]) -> Guess:
    """Match ``w~`` with each public weight that it may well come from; of these, the least apparent drift."""
    masked = taps(call.w.double())
    profile = _signatures(balanced(masked), 0)[:PROBES]

    def distance(name: str) -> float:
        lines = _signatures(balanced(taps(candidates[name])), 0)
        return float(torch.cdist(profile, lines).amin(1).mean())

    likely = sorted(candidates, key=distance)[:2]
    return basecase.best([_against(call, candidates, name, masked) for name in likely])


def _against(call: Call, candidates: Mapping[str, Tensor], name: str, masked: Tensor) -> Guess:
    """Undo ``w~`` as if it came from one public weight."""
    base = taps(candidates[name])
    rows, columns = match(masked, base)
    row_signs, column_signs = signs(masked, base[rows][:, columns])
    masked = masked * (row_signs[:, None] * column_signs)[..., None]
    row_scales, column_scales = fit_scales(masked, base[rows][:, columns])
    w = base.clone()  # rows that another operator holds stay public
    w[rows[:, None], columns] = masked / (row_scales[:, None] * column_scales)[..., None]
    return Guess(call, candidates, name, w.view_as(candidates[name]), rows, columns)


def match(masked: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """For each row and column of ``masked`` the one of ``other`` that it is a copy of, but for scale, sign and drift.

    Args:
        masked: m×d×taps, float64.
        other: M×d×taps with M ≥ m, float64.

    Returns:
        Rows (m) and columns (d).
    """
    ours = balanced(masked)

    def likeness(assigned: tuple[Tensor, Tensor]) -> float:
        rows, columns = assigned
        agreement = (ours * balanced(other[rows])[:, columns]).sum(2)
        row_signs, column_signs = signs(ours, other[rows][:, columns])
        return float(row_signs @ agreement @ column_signs)

    found = [refine(ours, other, *start) for start in _starts(ours, other)]
    # Magnitudes, if signs tell nothing: balancing them is balancing the weights.
    found += [refine(ours.abs(), other.abs(), *start) for start in _starts(ours.abs(), other.abs())]
    return max(found, key=likeness)


def signs(masked: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Signs of rows (m) and of columns (d) of ``masked`` under which it agrees with ``other``, matched; m×d×taps."""
    return agreeing((masked * other).sum(2))


def agreeing(agreement: Tensor) -> tuple[Tensor, Tensor]:
    """Signs ``a``, ``b`` that make ``aᵀ agreement b`` large: from the leading singular vectors, then in turn."""
    u, _, vh = torch.linalg.svd(agreement, full_matrices=False)
    a, b = sign(u[:, 0]), sign(vh[0])
    for _ in range(SWEEPS):
        a = sign(agreement @ b)
        b = sign(agreement.T @ a)
    return a, b


def sign(values: Tensor) -> Tensor:
    """1 or −1; 1 for zeros."""
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)


def fit_scales(masked: Tensor, public: Tensor) -> tuple[Tensor, Tensor]:
    """Scales with ``masked ≈ rows · columns · public``: medians of log ratios first, then least squares.

    Args:
        masked: m×d×taps, in the order of ``public``.
        public: The same shape.

    Returns:
        Of rows (m) and of columns (d), positive.
    """
    floor = public.abs().median() * 0.1
    usable = (public.abs() > floor) & (masked.sign() == public.sign())
    logs = torch.where(usable, (masked / public).abs().log(), torch.nan)
    rows, columns = torch.zeros(masked.shape[0], dtype=logs.dtype), torch.zeros(masked.shape[1], dtype=logs.dtype)
    for _ in range(10):
        rows = (logs - columns[:, None]).flatten(1).nanmedian(1).values.nan_to_num()
        columns = (logs - rows[:, None, None]).transpose(0, 1).flatten(1).nanmedian(1).values.nan_to_num()
    # Medians resist wrong assignments; among lines that fit, least squares are half as far off.
    a, b = rows.exp(), columns.exp()
    plain = masked / (a[:, None] * b)[..., None]
    fits = [functional.cosine_similarity(_lines(plain, axis), _lines(public, axis)) > 0.5 for axis in (0, 1)]
    public = public * (fits[0][:, None] & fits[1])[..., None]
    for _ in range(10):
        a = a * _factor(masked / (a[:, None] * b)[..., None], public, 0)
        b = b * _factor(masked / (a[:, None] * b)[..., None], public, 1)
    return a, b


def _factor(plain: Tensor, public: Tensor, axis: int) -> Tensor:
    """Least-squares factor of each line of ``axis`` over the public one; 1 where that is zero, or no fit."""
    plain, public = _lines(plain, axis), _lines(public, axis)
    factor = (plain * public).sum(1) / public.square().sum(1).clamp_min(1e-300)
    return torch.where((factor > 0.5) & (factor < 2.0), factor, 1.0)


def _lines(w: Tensor, axis: int) -> Tensor:
    """One line for each index of ``axis``, taps and all."""
    return (w if axis == 0 else w.transpose(0, 1)).flatten(1)


def taps(w: Tensor) -> Tensor:
    """As m×d×taps: a matrix has one tap, a convolution those of its kernel."""
    return w.reshape(*w.shape[:2], -1)


def balanced(w: Tensor) -> Tensor:
    """Scaled to rows and columns of unit mean square (Sinkhorn & Knopp): what scales a mask had is gone."""
    power = w.square().sum(2)
    rows, columns = torch.ones(w.shape[0], dtype=w.dtype), torch.ones(w.shape[1], dtype=w.dtype)
    for _ in range(30):
        rows = 1 / (power @ columns / w.shape[1]).clamp_min(1e-300)
        columns = 1 / (rows @ power / w.shape[0]).clamp_min(1e-300)
    return w * (rows[:, None] * columns).sqrt()[..., None]


def _signatures(w: Tensor, axis: int) -> Tensor:
    """One line for each index of ``axis``: the values of each tap along the other axis, in order, as quantiles."""
    values = (w if axis == 0 else w.transpose(0, 1)).sort(1).values.transpose(1, 2)
    # Fixed length, so that halves of a weight compare with wholes.
    return functional.interpolate(values, QUANTILES, mode="linear", align_corners=True).flatten(1)


def _starts(ours: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """First assignments: rows by signature and columns from these, then the other way round."""
    public = balanced(other)
    rows = assign(-torch.cdist(_signatures(ours, 0), _signatures(public, 0)))
    yield rows, assign(_products(ours, public[rows], 1))
    columns = assign(-torch.cdist(_signatures(ours, 1), _signatures(public, 1)))
    yield assign(_products(ours, public[:, columns], 0)), columns


def refine(ours: Tensor, other: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Match each axis in turn by inner products over the other, until nothing changes."""
    for _ in range(20):
        before = rows, columns
        rows = assign(_products(ours, balanced(other)[:, columns], 0))
        columns = assign(_products(ours, balanced(other[rows]), 1))  # of these rows alone: others may be elsewhere
        if torch.equal(rows, before[0]) and torch.equal(columns, before[1]):
            break
    return rows, columns


def _products(ours: Tensor, public: Tensor, axis: int) -> Tensor:
    """Inner products of every masked line of ``axis`` with every public one."""
    return _lines(ours, axis) @ _lines(public, axis).T


def assign(likeness: Tensor) -> Tensor:
    """For each line the other that it is assigned to, one to one, most alike in sum."""
    return torch.from_numpy(linear_sum_assignment(likeness.numpy(), maximize=True)[1])

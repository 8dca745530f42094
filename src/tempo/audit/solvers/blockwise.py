"""Masks of blocks, fitted: which rows and columns share a block, then least squares within what that allows.

`OneRound` is permutation × blocks × permutation. `TwoRounds` is two of those in a row: between a group of rows and a
group of columns lies a matrix of low rank with singular values 1, which is what gives the groups and both factors away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import csr_matrix, vstack
from sklearn.cluster import AgglomerativeClustering, KMeans
from torch import Tensor

from tempo.audit.solvers.frames import Start, polar, towards_a, towards_p, unmasked

FOUND = 0.5
"""Residuals from here up are those of wrong masks: orthogonal ones at random leave about 1.4."""


PROJECTIONS = 6
"""Of a two-round mask on low-rank parts between its groups, which also move to where they fit."""


def block_sizes(features: int, block: int) -> list[int]:
    """Sides of the blocks that `tempo.schemes.masks.draw_blocks` draws for one axis; one block where fewer fit."""
    count = max(1, features // block)
    side, larger = divmod(features, count)
    return [side + 1] * larger + [side] * (count - larger)


def cluster(magnitude: Tensor, sizes: list[int]) -> np.ndarray:
    """Group rows by where entries are large, in groups of given sizes: spectral embedding, then k-means."""
    count = len(sizes)
    if count == 1:
        return np.zeros(len(magnitude), dtype=int)
    centred = (magnitude - magnitude.mean()).numpy()
    alike = centred @ centred.T
    np.fill_diagonal(alike, 0)
    values, vectors = np.linalg.eigh(alike)
    kept = min(count - 1, len(values))
    places = vectors[:, -kept:] * np.sqrt(np.maximum(values[-kept:], 0))
    grown = AgglomerativeClustering(count).fit(places).labels_
    centres = np.stack([places[grown == number].mean(0) for number in range(count)])
    centres = KMeans(count, init=centres, n_init=1).fit(places).cluster_centers_
    return assign(-np.square(places[:, None] - centres).sum(2), sizes)


def assign(gains: np.ndarray, sizes: list[int]) -> np.ndarray:
    """The group of each item, groups being of given sizes, so that gains add up to the most; -1 for items left over.

    Args:
        gains: items×groups.
        sizes: Of the groups.
    """
    slots = np.repeat(np.arange(len(sizes)), sizes)
    groups = np.full(len(gains), -1)
    items, chosen = linear_sum_assignment(-gains[:, slots])
    groups[items] = slots[chosen]
    return groups


def _members(groups: np.ndarray, count: int) -> list[Tensor]:
    return [torch.from_numpy(np.flatnonzero(groups == number)) for number in range(count)]


class Model(Protocol):
    """A mask with a structure."""

    rows: np.ndarray
    """Group of each row of the mask."""

    @property
    def matrix(self) -> Tensor:
        """The mask."""
        ...

    def fit(self, towards: Tensor) -> None:
        """Move to the mask of the same structure with more of ``trace(maskᵀ towards)``."""
        ...


@dataclass
class OneRound:
    """Orthogonal blocks between groups of rows and groups of columns."""

    rows: np.ndarray
    columns: np.ndarray
    matrix: Tensor

    @classmethod
    def near(cls, matrix: Tensor, block: int, saturate: bool = True) -> OneRound:
        """The structure that an estimate suggests. A mask with fewer rows than columns leaves columns over.

        Args:
            matrix: The estimate.
            block: Side of the blocks.
            saturate: Count an entry as present or not, more than by its square: a row that leans on one column is then
                not carried off to another block together with it. Squares bear more noise.
        """
        sizes = block_sizes(len(matrix), block)
        squares = matrix.square()
        present = squares / (squares + 6 * squares.median() + 1e-12) if saturate else squares
        rows = cluster(present, sizes)
        columns = np.zeros(matrix.shape[1], dtype=int)
        for _ in range(20):
            before = rows
            columns = assign(present.numpy().T @ np.eye(len(sizes))[rows], sizes)
            taken = np.eye(len(sizes))[columns] * (columns >= 0)[:, None]
            rows = assign(present.numpy() @ taken, sizes)
            if np.array_equal(rows, before):
                break
        found = cls(rows, columns, torch.zeros_like(matrix))
        found.fit(matrix)
        return found

    def regroup(self, masked: Tensor, plain: Tensor) -> OneRound:
        """Groups of lines that span the same space: sharper than entries, once the other mask is about right.

        Args:
            masked: Lines (n×D) that this mask makes of ``plain``, give or take some drift.
            plain: Lines (N×D).
        """
        count = int(self.rows.max()) + 1
        sizes = [int((self.rows == number).sum()) for number in range(count)]
        if count == 1 or 2 * max(sizes) > plain.shape[1]:  # spaces as large as everything tell nothing
            return self
        rows = assign(_shares(masked, plain, self.columns, count), sizes)
        columns = assign(_shares(plain, masked, rows, count), sizes)
        return OneRound(rows, columns, self.matrix)

    def fit(self, towards: Tensor) -> None:
        """Procrustes, block by block."""
        matrix = torch.zeros_like(towards)
        for number in range(int(self.rows.max()) + 1):
            rows, columns = np.flatnonzero(self.rows == number), np.flatnonzero(self.columns == number)
            matrix[np.ix_(rows, columns)] = polar(towards[np.ix_(rows, columns)])
        self.matrix = matrix


def _shares(lines: Tensor, others: Tensor, groups: np.ndarray, count: int) -> np.ndarray:
    """Share of each line's energy in the span of each group of others: lines×groups."""
    energy = lines.square().sum(1).clamp_min(1e-300)
    spans = [torch.linalg.qr(others[np.flatnonzero(groups == number)].T).Q for number in range(count)]
    return torch.stack([(lines @ span).square().sum(1) / energy for span in spans], 1).numpy()


@dataclass
class TwoRounds:
    """Two rounds of blocks: ``outer`` from hidden features to groups of rows, ``inner`` from groups of columns."""

    rows: np.ndarray
    columns: np.ndarray
    outer: Tensor
    inner: Tensor
    outer_parts: list[tuple[Tensor, Tensor]] = field(repr=False)
    inner_parts: list[tuple[Tensor, Tensor]] = field(repr=False)

    @property
    def matrix(self) -> Tensor:
        """Both rounds."""
        return self.outer @ self.inner

    def fit(self, towards: Tensor) -> None:
        """Procrustes, block by block, one round after the other."""
        _procrustes(self.outer, self.outer_parts, towards @ self.inner.T)
        _procrustes(self.inner, self.inner_parts, self.outer.T @ towards)

    @classmethod
    def near(cls, matrix: Tensor, groups: Halves, block: int) -> TwoRounds:
        """Factors of an estimate whose groups are known.

        How many hidden features lie between each pair of groups is a transport problem: those of the largest singular
        values, as many to each group as it has members.
        """
        sizes = block_sizes(len(matrix), block)
        rows, columns = _members(groups.rows, len(sizes)), _members(groups.columns, len(sizes))
        pairs = [(i, j) for i in range(len(sizes)) for j in range(len(sizes))]
        parts = {(i, j): torch.linalg.svd(matrix[rows[i][:, None], columns[j]], full_matrices=False) for i, j in pairs}
        counts = _transport({pair: parts[pair][1].numpy() for pair in pairs}, sizes)
        outer, inner = torch.zeros_like(matrix), torch.zeros_like(matrix)
        by_row: list[list[int]] = [[] for _ in sizes]
        by_column: list[list[int]] = [[] for _ in sizes]
        used = 0
        for (i, j), count in counts.items():
            hidden = slice(used, used + count)
            used += count
            u, _, vt = parts[i, j]
            outer[rows[i], hidden] = u[:, :count]
            inner[hidden, columns[j]] = vt[:count]
            by_row[i] += range(used - count, used)
            by_column[j] += range(used - count, used)
        outer_parts = [(rows[i], torch.tensor(hidden)) for i, hidden in enumerate(by_row)]
        inner_parts = [(torch.tensor(hidden), columns[j]) for j, hidden in enumerate(by_column)]
        _procrustes(outer, outer_parts, outer.clone())
        _procrustes(inner, inner_parts, inner.clone())
        return cls(groups.rows, groups.columns, outer, inner, outer_parts, inner_parts)


def _procrustes(target: Tensor, parts: list[tuple[Tensor, Tensor]], towards: Tensor) -> None:
    for rows, columns in parts:
        target[rows[:, None], columns] = polar(towards[rows[:, None], columns])


def _transport(gains: dict[tuple[int, int], np.ndarray], sizes: list[int]) -> dict[tuple[int, int], int]:
    """How many of each pair's gains to take, the largest first, each group giving as many as its size."""
    places = [pair for pair, values in gains.items() for _ in values]
    all_gains, number = np.concatenate(list(gains.values())), np.arange(len(places))
    given = [
        csr_matrix((np.ones(len(places)), ([place[side] for place in places], number)), (len(sizes), len(places)))
        for side in (0, 1)
    ]
    solved = linprog(-all_gains, A_eq=vstack(given), b_eq=np.array([*sizes, *sizes]), bounds=(0, 1), method="highs-ds")
    counts = dict.fromkeys(gains, 0)
    for place, taken in zip(places, solved.x, strict=True):
        counts[place] += round(taken)
    return counts


@dataclass
class Halves:
    """Groups of rows and of columns of a two-round mask, before its factors are known."""

    rows: np.ndarray
    columns: np.ndarray

    @classmethod
    def of(cls, matrix: Tensor, block: int, power: float = 1.0) -> Halves:
        """From where entries are large: a pair of groups shares more or fewer hidden features."""
        sizes, magnitude = block_sizes(len(matrix), block), matrix.abs() ** power
        return cls(cluster(magnitude, sizes), cluster(magnitude.T, sizes))

    def project(self, matrix: Tensor, block: int) -> Tensor:
        """Between each pair of groups the nearest matrix with singular values 0 and 1; regroups by how well it fits."""
        sizes = block_sizes(len(matrix), block)
        rows, columns = _members(self.rows, len(sizes)), _members(self.columns, len(sizes))
        nearest = torch.zeros_like(matrix)
        row_gains, column_gains = matrix.new_zeros(len(matrix), len(sizes)), matrix.new_zeros(len(matrix), len(sizes))
        for i, here in enumerate(rows):
            for j, there in enumerate(columns):
                u, values, vt = torch.linalg.svd(matrix[here[:, None], there], full_matrices=False)
                kept = int((values > 0.5).sum())
                u, vt = u[:, :kept], vt[:kept]
                nearest[here[:, None], there] = u @ vt
                row_gains[:, i] += (matrix[:, there] @ vt.T).square().sum(1)
                column_gains[:, j] += (matrix[here].T @ u).square().sum(1)
        self.rows, self.columns = assign(row_gains.numpy(), sizes), assign(column_gains.numpy(), sizes)
        return nearest


@dataclass(frozen=True)
class Solution:
    """Fitted masks, and the weight that they make of the masked one.

    Attributes:
        p: ``P``, m×M.
        a: ``A``, d×d.
        w: ``Ŵ = Pᵀ w~ A``, M×d×taps, without what was taken for a cloak.
        structures: The fitted models of both masks; their rows are grouped as those and the columns of ``w~`` are.
        residual: ``‖Ŵ − W_base‖ / ‖W_base‖``; the attacker sees it.
    """

    p: Tensor
    a: Tensor
    w: Tensor
    structures: tuple[Model, Model]
    residual: float

    @property
    def rows(self) -> np.ndarray:
        """Group of each row of ``w~``."""
        return self.structures[0].rows

    @property
    def columns(self) -> np.ndarray:
        """Group of each column of ``w~``."""
        return self.structures[1].rows


def solve_one_round(
    masked: Tensor, base: Tensor, first: Start, block: int, *, cloak: int = 0, sweeps: int = 6, regroup: int = 4
) -> Solution:
    """Alternating least squares over both masks of one round, regrouping in between; the best sweep counts.

    Args:
        masked: ``w~``, m×d×taps.
        base: The reference, M×d×taps.
        first: Where to start.
        block: Side of the blocks.
        cloak: Rank of an additive cloak to take off.
        sweeps: How often to regroup.
        regroup: Steps of least squares between.
    """
    p, a = first.p, first.a
    solutions: list[Solution] = []
    failed = 0
    for sweep in range(sweeps):
        ours, theirs = (OneRound.near(each, block, saturate=sweep % 2 == 0) for each in (p, a))
        found = refit(masked, base, ours, theirs, cloak, regroup)
        for _ in range(3):
            taken = _uncloaked(masked, base, found.p, found.a, cloak)
            ours = ours.regroup(torch.einsum("mdt,de->met", taken, found.a).flatten(1), base.flatten(1))
            theirs = theirs.regroup(
                torch.einsum("mdt,mn->dnt", taken, found.p).flatten(1), base.transpose(0, 1).flatten(1)
            )
            again = refit(masked, base, ours, theirs, cloak, regroup)
            if again.residual > found.residual * (1 - 1e-3):
                break
            found = again
        least = min((each.residual for each in solutions), default=float("inf"))
        failed = 0 if found.residual < least * (1 - 1e-4) else failed + 1
        solutions.append(found)
        if failed == 2 and least < FOUND:
            break
        taken = _uncloaked(masked, base, found.p, found.a, cloak)
        rank_p, rank_a = _ranks(masked)
        p, a = polar(towards_p(taken, base, found.a), rank_p), polar(towards_a(taken, base, found.p), rank_a)
    return min(solutions, key=lambda each: each.residual)


def refit(masked: Tensor, base: Tensor, p: Model, a: Model, cloak: int, steps: int) -> Solution:
    """Least squares over both masks in turn, their structures kept; ends early where nothing changes."""
    taken, before = masked, float("inf")
    for step in range(steps):
        p.fit(towards_p(taken, base, a.matrix))
        a.fit(towards_a(taken, base, p.matrix))
        taken = _uncloaked(masked, base, p.matrix, a.matrix, cloak)
        if step % 8 == 7:
            residual = float((unmasked(taken, p.matrix, a.matrix) - base).norm())
            if residual > before * (1 - 1e-4):
                break
            before = residual
    w = unmasked(taken, p.matrix, a.matrix)
    held = p.matrix.square().sum(0) > 0.5  # rows of the base that this worker holds
    residual = float((w - base)[held].norm() / base[held].norm())
    return Solution(p.matrix, a.matrix, w, (p, a), residual)


def solve_two_rounds(
    masked: Tensor, base: Tensor, first: Start, block: int, *, cloak: int = 0, attempts: int = 6, steps: int = 120
) -> Solution:
    """Two rounds: group by sizes of entries, sharpen by projecting, then least squares over all four factors.

    Args:
        masked: ``w~``, m×m×taps: square, since sub-blocks' ranks show on full masks only.
        base: The reference, of the same shape.
        first: Where to start.
        block: Side of the blocks.
        cloak: Rank of an additive cloak to take off.
        attempts: Times to group anew at most, each from the masks of the one before, until two agree.
        steps: Steps of least squares at most.
    """
    p, a = first.p, first.a
    solutions: list[Solution] = []
    for attempt in range(attempts):
        power = (1.0, 0.5)[attempt % 2]  # two ways of grouping seldom fail alike
        ours, theirs = Halves.of(p, block, power), Halves.of(a, block, power)
        for _ in range(PROJECTIONS):
            near_p, near_a = polar(ours.project(p, block)), polar(theirs.project(a, block))
            taken = _uncloaked(masked, base, near_p, near_a, cloak)
            p, a = polar(towards_p(taken, base, near_a)), polar(towards_a(taken, base, near_p))
        fitted = TwoRounds.near(p, ours, block), TwoRounds.near(a, theirs, block)
        solutions.append(refit(masked, base, *fitted, cloak, 8))
        if attempt and abs(solutions[-1].residual - solutions[-2].residual) < 0.02 * solutions[-1].residual:
            break
        taken = _uncloaked(masked, base, solutions[-1].p, solutions[-1].a, cloak)
        p, a = polar(towards_p(taken, base, solutions[-1].a)), polar(towards_a(taken, base, solutions[-1].p))
    best = min(solutions, key=lambda each: each.residual)
    return refit(masked, base, *best.structures, cloak, steps)


def _uncloaked(masked: Tensor, base: Tensor, p: Tensor, a: Tensor, rank: int) -> Tensor:
    """``w~`` without the leading directions of what the masks leave beside the base."""
    if not rank:
        return masked
    rest = unmasked(masked, p, a) - base
    u, values, vt = torch.linalg.svd(rest.flatten(1), full_matrices=False)
    leading = ((u[:, :rank] * values[:rank]) @ vt[:rank]).view_as(rest)
    return masked - torch.einsum("mn,ndt,ed->met", p, leading, a)


def _ranks(masked: Tensor) -> tuple[int, int]:
    m, d, taps = masked.shape
    return min(m, d * taps), min(d, m * taps)


def freedom(shape: torch.Size, block: int, rounds: int = 1) -> float:
    """Share of a weight's own freedom that fitted masks take up: what least squares hides of a private change."""
    m, d = shape[:2]
    parameters = rounds * sum(side * (side - 1) / 2 for n in (m, d) for side in block_sizes(n, block))
    return min(0.95, parameters / shape.numel())


def choose_block(solve: Callable[[int], Solution], shape: torch.Size, blocks: tuple[int, ...], rounds: int) -> Solution:
    """Of fits with several block sizes, the one of least residual for its freedom; smaller blocks where equal."""
    fits = [(solve(block), freedom(shape, block, rounds)) for block in blocks]
    scores = [fit.residual / (1 - free) ** 0.5 for fit, free in fits]
    return next(fit for (fit, _), score in zip(fits, scores, strict=True) if score <= 1.05 * min(scores))

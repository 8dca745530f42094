"""Matches rows and columns of two masked tensors that show one thing twice, under permutations and positive scales.

Each side is stacks of *planes*, R×C×S: rows (samples, tokens, pixels), columns (features, channels), and what no mask
moves behind them (spatial positions, several tensors under one pair of masks). Scales of rows are divided out, scales
of columns cancel in ranks. Colour refinement (Weisfeiler and Leman 1968) gives a start, assignment (Kuhn 1955) of
columns and rows in turn, by correlation, the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from torch import Tensor

ROUNDS = 20
"""Assignments of columns and rows in turn, at the most."""

BALANCED = 20
"""Times that rows and columns are balanced in turn."""

CERTAIN = 0.8
"""Mean correlation from which no other start is tried; unrelated tensors reach 0.7 at 64 rows and 128 columns."""

EXACT = 600
"""Sides up to which assignments are exact: they cost their cube."""

PROJECTED = 24
"""Features that colour refinement keeps of every row and column."""


@dataclass(frozen=True)
class Match:
    """Which row and column of the second tensor each of the first's is; −1 where the second has fewer."""

    rows: Tensor
    columns: Tensor
    score: float
    """Mean correlation of matched columns."""

    correlations: Tensor
    """Of each column with its match; negative where the map between them falls."""


def stacks(value: Tensor, gradient: Tensor | None, output: bool) -> list[Tensor]:
    """One side of a match, as stacks of planes, R×C×S: the last is values alone, which scores are taken on.

    Args:
        value: ``y~`` or ``x~``, T×d….
        gradient: ``g~`` or ``dx~``, which lies under the same permutations, if at hand.
        output: Whether it is a product's output, whose gradient is zero where the next input is.
    """
    values = _standard(_ranks(balance(_flat(value))))
    zeros = (gradient if gradient is not None else value) if output else value
    patterns = torch.cat([_flat(value) > 0, _flat(zeros) != 0], 2).float()
    found = [_standard(patterns), values]
    if gradient is not None:
        gradient = gradient if output or bool((value != 0).all()) else gradient * (value > 0)  # back through ReLU
        found.insert(0, torch.cat([values, _standard(_ranks(balance(_flat(gradient))))], 2))
    return found


def _flat(x: Tensor) -> Tensor:
    return x.flatten(2) if x.dim() > 2 else x[:, :, None]


def balance(x: Tensor) -> Tensor:
    """``x`` (R×C×S) with rows and columns divided by their scales, as far as sizes tell them."""
    x = x.double()
    for _ in range(BALANCED):  # towards the one balanced form of all scaled ones (Sinkhorn)
        for axis in (0, 1):
            others = tuple(i for i in range(3) if i != axis)
            live = (x != 0).double().sum(others, keepdim=True).clamp_min(1)
            size = (x.square().sum(others, keepdim=True) / live).sqrt()
            x = x / torch.where(size > 0, size, 1.0)
    return x


def match(first: list[Tensor], second: list[Tensor], rows: Tensor | None = None, signed: bool = True) -> Match:
    """Match two sides with equally many positions behind them.

    Args:
        first: From `stacks`.
        second: Likewise.
        rows: The rows' match, where it is known; else it is found.
        signed: Whether columns rise together; else they may fall against each other (a negative scale of BatchNorm).
    """
    if rows is not None:
        return _by_rows(first[-1], second[-1], rows, signed)
    best: Match | None = None
    usable = min(len(first), len(second))
    for ours, theirs in zip(first[-usable:], second[-usable:], strict=True):
        if ours.shape[2] != theirs.shape[2]:
            continue
        for start in (_colours, _positions):
            found = _alternate(ours, theirs, start(ours, theirs), signed)
            found = _alternate(first[-1], second[-1], found.rows, signed)
            if best is None or found.score > best.score:
                best = found
            if best.score > CERTAIN:
                break
        if best is not None and best.score > CERTAIN:
            break
    assert best is not None  # noqa: S101 - values are always there
    if best.score > CERTAIN and len(first) == len(second):  # all the evidence for the last few columns
        return replace(_by_rows(first[0], second[0], best.rows, signed=False), score=best.score)
    return best


def match_unsigned(first: list[Tensor], second: list[Tensor]) -> Match:
    """As `match`, where a column's sign may differ from one side to the other too; magnitudes then find the rows."""
    found = match(first, second)
    if found.score > CERTAIN:
        return found
    magnitudes = match([ours.abs() for ours in first], [theirs.abs() for theirs in second], signed=False)
    found = max(found, _alternate(first[-1], second[-1], magnitudes.rows, signed=False), key=lambda each: each.score)
    if found.score > CERTAIN:
        return found
    return max(found, match(first, second, signed=False), key=lambda each: each.score)


def _alternate(first: Tensor, second: Tensor, rows: Tensor, signed: bool) -> Match:
    found = _by_rows(first, second, rows, signed)
    for _ in range(ROUNDS):
        kept = found.columns >= 0
        a = first[:, kept] * torch.where(found.correlations[kept] < 0, -1.0, 1.0)[:, None]
        b = second[:, found.columns[kept]]
        rows = assign(_cosines(a.flatten(1), b.flatten(1)))
        again = _by_rows(first, second, rows, signed)
        if torch.equal(again.columns, found.columns) and torch.equal(again.rows, found.rows):
            break
        found = again
    return found


def _by_rows(first: Tensor, second: Tensor, rows: Tensor, signed: bool) -> Match:
    kept = rows >= 0
    a, b = first[kept].transpose(0, 1).flatten(1), second[rows[kept]].transpose(0, 1).flatten(1)
    similar = _cosines(a, b)
    columns = assign(similar if signed else similar.abs())
    picked = similar.gather(1, columns.clamp_min(0)[:, None])[:, 0]
    correlations = torch.where(columns >= 0, picked, 0.0)
    return Match(rows, columns, float(correlations.abs().sum() / (columns >= 0).sum().clamp_min(1)), correlations)


def assign(gain: Tensor) -> Tensor:
    """For each row of ``gain`` the column assigned to it, for the largest sum; −1 where there are fewer columns.

    Above `EXACT` each takes its best, whoever else does.
    """
    if min(gain.shape) > EXACT:
        return gain.argmax(1)
    ours, theirs = linear_sum_assignment(gain.numpy(), maximize=True)
    found = torch.full((len(gain),), -1)
    found[torch.from_numpy(ours)] = torch.from_numpy(theirs)
    return found


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T


def _ranks(x: Tensor) -> Tensor:
    """Ranks within columns, ties shared: no monotone map of a column changes them."""
    shape = x.shape
    flat = x.transpose(1, 2).reshape(-1, shape[1]).numpy()
    # Equal zeros of different rows stay equal; rounding of everything else does not matter.
    ranked = torch.from_numpy(rankdata(flat, axis=0).astype(np.float32))
    return ranked.reshape(shape[0], shape[2], shape[1]).transpose(1, 2)


def _standard(x: Tensor) -> Tensor:
    centred = x - x.mean((0, 2), keepdim=True)
    deviation = centred.square().mean((0, 2), keepdim=True).sqrt()
    return torch.where(deviation > 1e-6, centred / deviation.clamp_min(1e-6), 0.0)


def _positions(first: Tensor, second: Tensor) -> Tensor:
    """Rows by what all columns have in common at each position."""
    return assign(-torch.cdist(_scaled(first.mean(1)), _scaled(second.mean(1))))


def _colours(first: Tensor, second: Tensor) -> Tensor:
    """Rows by colour refinement: features that permutations do not change, of rows and columns in turn."""
    return assign(-torch.cdist(_refined(first), _refined(second)))


def _refined(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the same projection on both sides
    rows = _scaled(torch.cat([x.mean(1), x.square().mean(1)], 1))
    columns = _scaled(torch.cat([x.mean(0), x.pow(3).mean(0)], 1))
    for _ in range(3):
        new = []
        for axis, other in ((0, columns), (1, rows)):
            moved = x if axis == 0 else x.transpose(0, 1)
            powers = torch.cat([other, other**2, other**3], 1)
            features = torch.einsum("rcs,ck->rsk", moved, powers).flatten(1) / moved.shape[1]
            features = torch.cat([moved.mean(1), features], 1)
            if features.shape[1] > PROJECTED:
                projection = torch.randn(features.shape[1], PROJECTED, generator=generator)
                features = _scaled(features) @ projection
            new.append(_scaled(features))
        rows, columns = new
    return rows


def _scaled(features: Tensor) -> Tensor:
    return (features - features.mean(0)) / features.std(0).clamp_min(1e-6)

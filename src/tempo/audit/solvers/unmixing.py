"""What attacks on reused feature masks share: rows gathered under one ``A``, and how well a guess separates them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from tempo.audit.attack import Effort, Figure, NotApplicable, Outcome
from tempo.audit.transcript import Call, View
from tempo.audit.truth import CallTruth, Truth
from tempo.schemes.masks import Form
from tempo.schemes.sandwich import sandwich

ROWS: dict[Effort, int] = {"quick": 1 << 13, "full": 1 << 17}
WIDTH: dict[Effort, int] = {"quick": 128, "full": 1024}
PRODUCTS: dict[Effort, int] = {"quick": 3, "full": 1000}
UNCORRELATED = 0.1
"""Correlation of components, in root mean square, up to which they count as uncorrelated."""

CHANCES = 4
"""Random rotations that the level of chance is the mean of."""


@dataclass(frozen=True)
class Gathered:
    """Masked inputs of one product that may share ``A``: rows×d, float64; pixels count as rows."""

    calls: list[Call]
    x: Tensor


@dataclass(frozen=True)
class Unmixing:
    """A guess: ``x~ @ matrix`` has plain features as columns, in some order, scaled somehow."""

    gathered: Gathered
    matrix: Tensor


def gather(view: View, effort: Effort) -> list[Gathered]:
    """Masked inputs by weight number, which share ``A`` for certain, and by product, in case that masks do not change.

    Raises:
        NotApplicable: Nowhere are there more rows than features.
    """
    found = []
    layers = sorted(view.layers, key=lambda layer: view.of(layer)[0].x.shape[1])
    for layer in layers:
        calls = view.of(layer)
        by_weight: dict[int, list[Call]] = {}
        for call in calls:
            by_weight.setdefault(call.weight, []).append(call)
        largest = max(by_weight.values(), key=lambda some: sum(_rows(call) for call in some))
        candidates = [largest] if len(largest) == len(calls) else [largest, calls]
        for some in candidates:
            width = some[0].x.shape[1]
            if width <= WIDTH[effort] and sum(map(_rows, some)) >= 4 * width:
                found.append(Gathered(some, _stack([flat(call.x) for call in some], ROWS[effort])))
    if not found:
        raise NotApplicable(f"no product of at most {WIDTH[effort]} features with four times as many rows")
    return found[: 2 * PRODUCTS[effort]]


def flat(x: Tensor) -> Tensor:
    """Rows × features, float64: pixels of a convolution's input become rows."""
    return x.double() if x.dim() == 2 else x.double().movedim(1, -1).flatten(0, -2)


def features_masked(known: CallTruth) -> Tensor:
    """``X A^-1``: the plain input under the mask of features alone, in float64."""
    x = known["x"].double()
    masked = torch.empty(x.shape, dtype=torch.float64)
    sandwich(x, None, known.mask("A").operator(Form.DUAL), [masked])
    return masked


def separation(recovered: Sequence[Unmixing], truth: Truth, what: str) -> Outcome:
    """Mean |correlation| of plain features with recovered ones, assigned one to one; mixed rows do not count.

    Chance is the same after a random rotation of whitened features or, where the guess's own components are correlated,
    of features as they are if that is more: features with common causes correlate with anything.
    """
    best, chance = 0.0, 0.0
    for guess in recovered:
        known = [truth.of(call) for call in guess.gathered.calls]
        plain = _stack([flat(k["x"]) for k in known], 1 << 14)
        masked = _stack([flat(features_masked(k)) for k in known], 1 << 14)
        components = masked @ guess.matrix
        value = mean_best_correlation(plain, components)
        if value >= best:
            best, chance = value, _by_chance(plain, whiten(masked)[0])
            if not _uncorrelated(components):
                chance = max(chance, _by_chance(plain, masked))
    return Outcome(
        figures=[
            Figure(
                name="features separated",
                value=best,
                leaks=(1 + chance) / 2,
                chance=chance,
                ceiling=1.0,
                meaning=f"mean |correlation| of plain features with one {what} each, at the worst product",
            )
        ]
    )


def _uncorrelated(components: Tensor) -> bool:
    """Whether columns correlate with one another no more than `UNCORRELATED`, in root mean square."""
    between = torch.corrcoef(components.T).nan_to_num_()
    pairs = len(between) * max(len(between) - 1, 1)
    return float(between.fill_diagonal_(0.0).norm()) <= UNCORRELATED * sqrt(pairs)


def _by_chance(plain: Tensor, features: Tensor) -> float:
    """What random rotations of ``features`` reach, in the mean."""
    generator, width = torch.Generator().manual_seed(0), features.shape[1]
    rotations = (torch.randn(width, width, generator=generator, dtype=torch.float64) for _ in range(CHANCES))
    return sum(mean_best_correlation(plain, features @ torch.linalg.qr(r)[0]) for r in rotations) / CHANCES


def mean_best_correlation(plain: Tensor, recovered: Tensor) -> float:
    """Over columns of ``plain`` that vary, the mean |correlation| with the column of ``recovered`` assigned to each.

    One to one, by optimal assignment: a direction that all features have in common counts once.
    """
    from scipy.optimize import linear_sum_assignment

    plain, recovered = (t - t.mean(0) for t in (plain, recovered))
    spread = plain.norm(dim=0)
    plain = plain[:, spread > 1e-6 * spread.max()]
    norms = [t.norm(dim=0).clamp_min(1e-12) for t in (plain, recovered)]
    correlation = ((plain / norms[0]).T @ (recovered / norms[1])).abs()
    features, components = linear_sum_assignment(correlation.numpy(), maximize=True)
    return float(correlation[features, components].sum() / len(correlation))


def whiten(x: Tensor, centre: bool = True) -> tuple[Tensor, Tensor]:
    """Decorrelated columns of unit variance, and the matrix that makes them of ``x`` (or of ``x`` less its mean).

    Directions without variance are left out.
    """
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    kept = values > 1e-9 * values[-1]
    matrix = vectors[:, kept] * values[kept].rsqrt()
    return (centred if centre else x) @ matrix, matrix


def fast_ica(x: Tensor, iterations: int = 200, seed: int = 0) -> Tensor:
    """Unmixing matrix (d×k) by FastICA (Hyvärinen, 1999): ``x @ matrix`` has independent columns."""
    import warnings

    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    white, matrix = whiten(x)
    ica = FastICA(whiten=False, max_iter=iterations, tol=1e-4, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # scored by what it reached
        ica.fit(white.float().numpy())  # single precision is twice as fast, and sampling errors are larger
    return matrix @ torch.from_numpy(ica.components_).T.double()


def _rows(call: Call) -> int:
    return call.x.numel() // call.x.shape[1]


def _stack(parts: list[Tensor], most: int) -> Tensor:
    """Put together, every n-th row where there are more than ``most``."""
    total = sum(len(part) for part in parts)
    return torch.cat([part[:: -(-total // most)] for part in parts])

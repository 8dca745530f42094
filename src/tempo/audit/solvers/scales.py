"""Scales of rows and channels, by least squares: of what ReLU let through, an input is linear in the output before."""

from __future__ import annotations

import torch
from torch import Tensor

from tempo.audit.solvers.matching import balance

ALTERNATIONS = 60
"""Least squares for rows and channels in turn."""

NEARLY_LINEAR = 0.85
"""Quantile of a channel from which GELU and the like are taken for linear."""

SLOPES = 4
"""Live positions from which a map of one sample and channel gives slope and intercept by itself."""


def row_factors(x: Tensor, y: Tensor, dx: Tensor | None, g: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Scales of rows, from ``x~ = v (α y / f + β)`` where it is positive: linear, as ReLU leaves it.

    Of every sample and channel, slopes are ``v α / f`` and intercepts ``v β``, both of rank one. Slopes come from the
    map's positions, or, of vectors, from gradients (``g / dx``; not through BatchNorm). Where the activation is a
    smooth one, only the largest values are taken: there it is nearly linear.

    Args:
        x: T×C…, scales unknown.
        y: T×C…, rows matched, wrong by factors ``f``.
        dx: Gradient of ``x``.
        g: Gradient of ``y``.

    Returns:
        Logarithms of ``v / f`` and of ``v``, each up to a constant; None where nothing tells them.
    """
    x, y = (t.flatten(2) if t.dim() > 2 else t[:, :, None] for t in (x, y))
    live = x > 0
    if bool((x != 0).all()):
        even = balance(x)
        live = live & (even >= even.movedim(1, 0).flatten(1).quantile(NEARLY_LINEAR, 1)[:, None])
    live = live.double()
    count = live.sum(2)
    mean_x, mean_y = ((live * t).sum(2) / count.clamp_min(1) for t in (x, y))
    if x.shape[2] == 1:
        if g is None or dx is None:
            return None
        slope = torch.where((live[:, :, 0] > 0) & (dx != 0), g / dx, 0.0)
        known = slope > 0
    else:
        centred = live * (y - mean_y[:, :, None])
        slope = (centred * x).sum(2) / centred.square().sum(2).clamp_min(1e-300)
        known = (count >= SLOPES) & (centred.square().sum(2) > 1e-12 * (live * y * y).sum(2)) & (slope != 0)
    intercept = torch.where(known, mean_x - slope * mean_y, 0.0)
    return _rank_one(slope, known), _rank_one(intercept, known & (intercept.abs() > 1e-3 * mean_x))


def _rank_one(matrix: Tensor, known: Tensor) -> Tensor:
    """Logarithms of the rows' factors of ``|matrix| = u αᵀ``, by medians in turn."""
    logs = torch.where(known, matrix.abs().clamp_min(1e-300).log(), torch.nan)
    rows, columns = torch.zeros(logs.shape[0]).double(), torch.zeros(logs.shape[1]).double()
    for _ in range(20):
        columns = (logs - rows[:, None]).nanmedian(0).values.nan_to_num()
        rows = (logs - columns).nanmedian(1).values.nan_to_num()
    return rows


def channels(x: Tensor, terms: Tensor, log_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of ``x~ = v relu(Σ α y + β)``, channel by channel, and ``v``.

    Args:
        x: T×C….
        terms: The ``y``, K×T×C….
        log_v: Where to start from.

    Returns:
        ``α`` (K×C), ``β`` (C) and the logarithm of ``v`` (T).
    """
    x = x.flatten(2) if x.dim() > 2 else x[:, :, None]
    terms = terms.reshape(len(terms), *x.shape)
    design = torch.cat([terms, torch.ones_like(terms[:1])]).movedim(0, -1)  # T×C×S×(K+1)
    size = design.square().mean((0, 2), keepdim=True).sqrt().clamp_min(1e-300)
    design = design / size
    live = (x > 0).double()[..., None]
    gram = torch.einsum("tcsk,tcsl->tckl", design * live, design)
    right = torch.einsum("tcsk,tcs->tck", design * live, x)
    v = log_v.exp()
    solved = torch.zeros(x.shape[1], design.shape[-1]).double()
    ridge = 1e-12 * torch.eye(design.shape[-1]).double()
    for _ in range(ALTERNATIONS):
        total = gram.sum(0)
        trace = total.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300)
        solved = torch.linalg.solve(total + ridge * trace[:, None, None], (right / v[:, None, None]).sum(0))
        energy = torch.einsum("ck,tckl,cl->tc", solved, gram, solved)
        agreement = torch.einsum("tck,ck->tc", right, solved)
        weight = 1 / energy.sum(0).clamp_min(1e-300)
        new = (agreement * weight).sum(1) / (energy * weight).sum(1).clamp_min(1e-300)
        v = torch.where(torch.isfinite(new) & (new > 0), new, v)
    # A unit seen alive a few times only: as steep as the others, and as high as it was seen, or silent.
    few = live.sum((0, 2, 3)) <= design.shape[-1]
    if bool(few.any()) and not bool(few.all()):
        solved[few, :-1] = solved[~few, :-1].median(0).values
        linear = torch.einsum("tcsk,ck->tcs", design[..., :-1], solved[:, :-1])
        seen = (live[..., 0] * (x / v[:, None, None] - linear)).sum((0, 2)) / live.sum((0, 2, 3)).clamp_min(1)
        silent = -linear.amax((0, 2))
        last = torch.where(live.sum((0, 2, 3)) > 0, seen, silent) / size[0, :, 0, -1]
        solved[few, -1] = last[few]
    solved = solved / size[0, :, 0]
    return solved[:, :-1].T, solved[:, -1], v.log()

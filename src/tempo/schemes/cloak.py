"""The cloak: a secret random matrix of low rank added to ``W`` before it is masked, and taken off the answers here.

In PyTorch's layout ``w`` (m×d) goes out as ``w + U V``, with ``U`` m×k and ``V`` k×d. So workers return ``Y + (X Vᵀ)
Uᵀ`` and ``dX + (G U) V``, and what is too much costs O(k) per element to compute and subtract: of matrices, in the
passes that mask and unmask. ``dW`` does not depend on ``w``. Of a convolution ``w`` is taken as the matrix o ×
(c·kernel), in each group by itself: ``V`` is then a convolution of the same stride, padding and dilation to k channels,
``U`` one of 1×1.

How strong. A worker that knows the base checkpoint lines up singular vectors of the masked weight with those of the
base; the cloak must turn them, and must not be separable itself. If it sticks out of the spectrum it is: dropping the
leading singular directions of ``w~`` then takes it away. By Baik, Ben Arous and Péché (2005; for rectangular matrices
Benaych-Georges and Nadakuditi, 2012) a spike on an m×d matrix of independent entries makes no outlier, and leaves no
trace in the leading singular vectors, up to β^¼ ρ, where β ≤ 1 is the aspect ratio and ρ the root mean square
singular value. Trained matrices are such a bulk under some large directions, so ρ is taken over the spectrum less its
leading 2k directions. The cloak's singular values are drawn log-uniform between ``strength · β^¼ ρ`` and 1/`SPREAD`
of it, and brought within the extreme Ritz values of ``w wᵀ``, which never leave its spectrum. A few steps of the
Lanczos process give those and, as nodes of a quadrature (Golub and Meurant, 2010), the spectrum's distribution: no
singular value decomposition.

Two limits. On a narrow matrix (β below 0.15) everything inside the spectrum is above β^¼ ρ: no cloak on it is both.
And of a weight of zeros the cloak is zero too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempo import kernels
from tempo.keys import Keystream
from tempo.schemes import haar
from tempo.schemes.arithmetic import output, subtract_input_gradient
from tempo.schemes.low_rank import LowRank
from tempo.schemes.operators import work_dtype
from tempo.schemes.reply import MOST_WATCHED, Watch
from tempo.wire.messages import Conv, Muon, Product, Rule
from tempo.worker.update import apply

STRENGTH = 1.0
"""Largest singular value of a cloak, in units of what makes no outlier in a random matrix."""

SPREAD = 1.5
"""Ratio of the largest to the least."""

FLOOR = 0.1
"""Least ρ, in units of the root mean square of all singular values."""

STEPS = 6
"""Of the Lanczos process; each reads ``w`` twice."""


@dataclass(frozen=True)
class Cloak:
    """``U`` (m×k) and ``V`` (k×d; groups·k × c/groups × kernel of a convolution) on the weight of ``product``."""

    product: Product
    U: Tensor
    V: Tensor

    @property
    def groups(self) -> int:
        """Independent groups of channels."""
        return self.product.groups if isinstance(self.product, Conv) else 1

    @property
    def factors(self) -> LowRank | None:
        """What it adds to the weight of a matrix product, to be added on the way; None of a convolution."""
        return None if isinstance(self.product, Conv) else LowRank(self.U, self.V)

    def cover(self, w: Tensor) -> Tensor:
        """``w + U V``."""
        rank = self.U.shape[1]
        U, V = self.U.view(self.groups, -1, rank), self.V.reshape(self.groups, rank, -1)
        return torch.baddbmm(w.to(U.dtype).reshape(self.groups, U.shape[1], -1), U, V).view(w.shape)

    def watch_input(self, x: Tensor) -> Watch | None:
        """Has who masks ``X`` make ``X Vᵀ`` on the way; None where that cannot be."""
        return Watch.of(self.V, len(x)) if self._watchable(x) else None

    def watch_gradient(self, g: Tensor) -> Watch | None:
        """The same of ``G U``."""
        return Watch.of(self.U.t().contiguous(), len(g)) if self._watchable(g) else None

    def _watchable(self, t: Tensor) -> bool:
        return t.dim() == 2 and self.U.dtype == torch.float32 and self.U.shape[1] <= MOST_WATCHED

    def seen_by_input(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        """``X Vᵀ``, as ``watch`` saw it, if it did: T×k, or N × groups·k × spatial."""
        return watch.sums.t() if watch is not None and watch.seen else output(self.product, x, self.V)

    def in_output(self, xv: Tensor) -> LowRank | None:
        """What takes ``(X Vᵀ) Uᵀ`` off ``Y``, to be added; None of a convolution."""
        return None if isinstance(self.product, Conv) else LowRank(xv, self.U.t().neg())

    def uncover_output(self, y: Tensor, xv: Tensor) -> None:
        """``Y -= (X Vᵀ) Uᵀ``, in place, of a convolution."""
        axes, rank = y.dim() - 2, self.U.shape[1]
        alone = Conv((1,) * axes, (0,) * axes, (1,) * axes, self.groups)
        U = self.U.view(self.groups, -1, rank).mT.reshape(-1, len(self.U) // self.groups, *[1] * axes)
        subtract_input_gradient(alone, xv, U, y)

    def seen_by_gradient(self, g: Tensor, watch: Watch | None = None) -> Tensor:
        """``G U``, as ``watch`` saw it, if it did: T×k, or N × groups·k × spatial."""
        if watch is not None and watch.seen:
            return watch.sums.t()
        g = g.to(self.U.dtype)
        if g.dim() == 2:
            return g @ self.U
        n, groups, rank = len(g), self.groups, self.U.shape[1]
        U = self.U.view(groups, -1, rank)
        return torch.matmul(U.mT, g.reshape(n, groups, U.shape[1], -1)).view(n, groups * rank, *g.shape[2:])

    def in_input_gradient(self, gu: Tensor) -> LowRank | None:
        """What takes ``(G U) V`` off ``dX``, to be added; None of a convolution."""
        return None if isinstance(self.product, Conv) else LowRank(gu, self.V.neg())

    def uncover_input_gradient(self, dx: Tensor, gu: Tensor) -> None:
        """``dX -= (G U) V``, in place, of a convolution."""
        subtract_input_gradient(self.product, gu, self.V, dx)


def together(cloaks: Sequence[tuple[Cloak, float]]) -> Cloak:
    """Several cloaks on one matrix, each so many times over, as one."""
    first = cloaks[0][0]
    U = torch.cat([cloak.U * count for cloak, count in cloaks], 1)
    return Cloak(first.product, U, torch.cat([cloak.V for cloak, _ in cloaks]))


def draw(stream: Keystream, product: Product, w: Tensor, rank: int, strength: float = STRENGTH) -> Cloak:
    """A cloak for ``w``.

    Args:
        stream: Where the randomness comes from.
        product: What the weight is for.
        w: Output features first.
        rank: At most; a smaller weight gets as much as it has.
        strength: See above; 1 is the most that a random matrix hides. For experiments.
    """
    groups = product.groups if isinstance(product, Conv) else 1
    matrices = w.to(work_dtype(w)).reshape(groups, len(w) // groups, -1)
    rank = min(rank, *matrices.shape[1:])
    sigma = _singular_values(stream, matrices, rank, strength).unsqueeze(1)
    U = _orthonormal(stream, groups, matrices.shape[1], rank, matrices.dtype) * sigma.to(matrices.dtype)
    V = _orthonormal(stream, groups, matrices.shape[2], rank, matrices.dtype).mT
    return Cloak(product, U.reshape(len(w), rank), V.reshape(groups * rank, *w.shape[1:]))


def _singular_values(stream: Keystream, w: Tensor, rank: int, strength: float) -> Tensor:
    """Those of the cloaks on a batch of matrices (groups×m×n): groups×rank, float64."""
    nodes, weights = spectrum(stream, w)
    narrow, wide = sorted(w.shape[1:])
    leading = min(2 * rank / narrow, 0.5)
    # Descending, the share of the spectrum that each node stands for, less the leading part.
    bulk = (weights.flip(1).cumsum(1) - leading).clamp_min(0).minimum(weights.flip(1)).flip(1)
    # Of a weight of low rank nothing is left then; a cloak as faint would not turn anything.
    energies = (bulk * nodes**2).sum(1) / bulk.sum(1), FLOOR**2 * (weights * nodes**2).sum(1)
    rms = torch.maximum(*energies).sqrt().unsqueeze(1)
    highest = strength * (narrow / wide) ** 0.25 * rms
    drawn: Tensor = highest * haar.uniforms(stream, len(w) * rank).view(len(w), rank).mul(-math.log(SPREAD)).exp()
    reached = weights > 1e-9
    least: Tensor = nodes.where(reached, math.inf).amin(1, keepdim=True)
    largest: Tensor = nodes.where(reached, 0.0).amax(1, keepdim=True)
    return drawn.maximum(least).minimum(largest)


def spectrum(stream: Keystream, w: Tensor, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Where singular values of a batch of matrices lie: nodes, ascending, and the share that each stands for.

    The Lanczos process on ``w wᵀ`` (or ``wᵀ w``, the smaller) from a random vector. All nodes of a share above
    rounding lie between the least and the largest singular value.

    Args:
        stream: Where the vector comes from.
        w: groups×m×n.
        steps: How many, at most.

    Returns:
        Both groups×steps, float64.
    """
    groups, side = len(w), min(w.shape[1:])
    steps = min(steps, side)
    z = haar.gaussians(stream, groups * side, w.dtype).view(groups, side, 1)
    z /= z.norm(dim=1, keepdim=True)
    projected = torch.zeros(groups, steps, steps, dtype=torch.float64)
    native = kernels.native()
    if native is not None and w.dtype == torch.float32 and steps:
        for matrix, vector, found in zip(w.detach(), z.squeeze(2), projected, strict=True):
            native.lanczos(matrix if matrix.stride(1) == 1 else matrix.t().contiguous(), vector, found)
    else:
        _project(w, z, projected)
    projected = projected.triu() + projected.triu(1).mT
    values, vectors = torch.linalg.eigh(projected)
    return values.clamp_min(0).sqrt(), vectors[:, 0, :] ** 2


def _project(w: Tensor, z: Tensor, projected: Tensor) -> None:
    """Fill the upper triangles of ``projected``; `native/lanczos.h` in PyTorch."""
    if w.shape[1] > w.shape[2]:
        w = w.mT
    basis = w.new_zeros(*w.shape[:2], projected.shape[2])
    for step in range(projected.shape[2]):
        basis[:, :, step : step + 1] = z
        image = w @ (w.mT @ z)
        whole = image.norm(dim=1, keepdim=True)
        for again in range(2):  # once more, since rounding leaves a part
            along = basis.mT @ image
            if not again:
                projected[:, :, step] = along.squeeze(2)
            image = image - basis @ along
        rest = image.norm(dim=1, keepdim=True)
        # Nothing is left where the vector's directions are exhausted; further nodes then have no share.
        z = torch.where(rest > 1e-5 * whole, image / rest.clamp_min(torch.finfo(w.dtype).tiny), 0.0)


def _orthonormal(stream: Keystream, count: int, side: int, rank: int, dtype: torch.dtype) -> Tensor:
    """``count`` × side × rank, uniform among orthonormal columns; signs as in `haar.orthogonal`."""
    gaussians = haar.gaussians(stream, count * side * rank, dtype).view(count, side, rank)
    q: Tensor
    q, r = torch.linalg.qr(gaussians)
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2).to(dtype)


@dataclass(frozen=True)
class Lying:
    """A cloak, and how many times over it lies on a weight (``w``) and on what an optimizer keeps of it by now.

    Gradients know nothing of cloaks. So a linear optimizer makes of a cloak what it would make of a single number.
    """

    cloak: Cloak
    counts: dict[str, Tensor]

    def follow(self, rule: Rule, scale: float) -> None:
        """Go along with an update whose gradient was scaled by ``scale``."""
        w = self.counts.setdefault("w", torch.zeros((), dtype=torch.float64))
        if isinstance(rule, Muon):  # its update is not linear, so no cloak lies on its gradient or momentum
            w *= 1 - rule.lr * rule.weight_decay
            return
        gradient = self.counts.pop("gradient", torch.zeros_like(w)) * scale
        kept = {name: count for name, count in self.counts.items() if name != "w"}
        apply(rule, w, gradient, kept)
        self.counts.update(kept)

"""Where attacks on block mixing start: a sparse matrix between two bases that a masked and a public weight share.

With ``w~ = P w Aᵀ`` (orthogonal masks) and singular value decompositions ``w~ = Ũ S̃ Ṽᵀ`` and ``w₀ = U₀ S₀ V₀ᵀ``,
matched by order, ``A ≈ Ṽ D V₀ᵀ`` and ``P ≈ Ũ D U₀ᵀ`` with a diagonal ``D`` of unknown signs. Block masks are sparse and
almost all other choices of ``D`` give dense matrices, so fourth powers of entries tell the right one. A cloak or drift
moves singular vectors among those of near singular values: ``D`` is then replaced by a band, ``X`` with weights
falling with the distance of singular values.

The start is spectral: of the vectors ``z_ab`` (products of rows of both bases), the top eigenvectors of
``Σ_ab (‖z_ab‖² − mean) z_ab z_abᵀ``, after Hopkins, Schramm, Shi and Steurer, *Fast spectral algorithms from
sum-of-squares proofs* (STOC 2016), section 4, planted sparse vectors; then fixed-point ascent of the fourth powers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

STARTS = 6
"""Eigenvectors to start from, and as many random sign vectors."""

_ASCENT = 80
"""Steps of the ascent at most; it settles in ten to thirty."""


def polar(matrix: Tensor, rank: int | None = None) -> Tensor:
    """Nearest matrix with orthonormal rows or columns; of the leading ``rank`` singular directions alone, if given."""
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = u[:, :rank] @ vt[:rank]
    return nearest


def as_taps(w: Tensor) -> Tensor:
    """m×d or m×d×kernel… as m×d×taps, float64."""
    return w.double().reshape(*w.shape[:2], -1)


def towards_p(masked: Tensor, base: Tensor, a: Tensor) -> Tensor:
    """``w~ A w₀ᵀ``, summed over taps: its polar factor is the least-squares ``P``, given ``A``."""
    rotated = torch.einsum("mdt,de->met", masked, a)
    return rotated.flatten(1) @ base.flatten(1).T


def towards_a(masked: Tensor, base: Tensor, p: Tensor) -> Tensor:
    """``w~ᵀ P w₀``, summed over taps: its polar factor is the least-squares ``A``, given ``P``."""
    rotated = torch.einsum("mn,ndt->mdt", p, base)
    return masked.transpose(0, 1).flatten(1) @ rotated.transpose(0, 1).flatten(1).T


def unmasked(masked: Tensor, p: Tensor, a: Tensor) -> Tensor:
    """``Pᵀ w~ A``, by taps."""
    return torch.einsum("mn,mdt,de->net", p, masked, a)


@dataclass(frozen=True)
class Bases:
    """Both weights' singular vectors on one side, and their singular values, in order."""

    masked: Tensor
    public: Tensor
    masked_values: Tensor
    public_values: Tensor

    @property
    def rank(self) -> int:
        """Of either."""
        return self.masked.shape[1]

    @property
    def is_full(self) -> bool:
        """Whether the vectors span the whole side."""
        return self.rank == self.masked.shape[0] == self.public.shape[0]

    def sparsity(self, matrix: Tensor) -> float:
        """Fourth powers of a matrix between both bases, beside those that random signs give: about 1 is chance."""
        chance = 3 * self.rank**2 / (self.masked.shape[0] * self.public.shape[0])
        return float(matrix.double().square().square().sum()) / chance


def sides(masked: Tensor, base: Tensor) -> tuple[Bases, Bases]:
    """Bases on the side of input features (``A``) and of output features (``P``).

    Args:
        masked: ``w~``, m×d×taps.
        base: ``w₀``, M×d×taps.
    """
    if masked.shape[2] == 1:  # one decomposition, so that signs on both sides are the same
        (um, sm, vm), (u0, s0, v0) = (torch.linalg.svd(each[:, :, 0], full_matrices=False) for each in (masked, base))
        rank = min(len(sm), len(s0))
        sm, s0 = sm[:rank], s0[:rank]
        return Bases(vm[:rank].T, v0[:rank].T, sm, s0), Bases(um[:, :rank], u0[:, :rank], sm, s0)
    found = []
    for axis in (1, 0):
        (um, sm, _), (u0, s0, _) = (
            torch.linalg.svd(each.transpose(0, axis).flatten(1), full_matrices=False) for each in (masked, base)
        )
        rank = min(len(sm), len(s0))
        found.append(Bases(um[:, :rank], u0[:, :rank], sm[:rank], s0[:rank]))
    return found[0], found[1]


@dataclass(frozen=True)
class Start:
    """First estimates of both masks, and how sparse the one that was searched came out (about 1 is chance)."""

    p: Tensor
    a: Tensor
    sparsity: float


def start(masked: Tensor, base: Tensor, width: float = 0.0, seed: int = 0) -> Start:
    """Find masks by their sparsity alone.

    Args:
        masked: ``w~``, m×d×taps, float64.
        base: ``w₀``, M×d×taps, float64.
        width: 0 takes singular vectors as matched by order, up to signs. Above, how far they may have moved, as a part
            of the root mean square singular value: for cloaks, and for drift beyond some percent.
        seed: Of the attacker's own randomness.
    """
    inputs, outputs = sides(masked, base)
    one_tap = masked.shape[2] == 1
    if width:
        side = inputs if inputs.is_full or not outputs.is_full else outputs
        matrix = banded(side, width, seed)
    elif one_tap:  # both sides have the same signs
        signs = search_signs([inputs, outputs], seed)
        return Start(_signed(outputs, signs), _signed(inputs, signs), inputs.sparsity(_signed(inputs, signs)))
    else:
        found = [(each, _signed(each, search_signs([each], seed))) for each in (inputs, outputs)]
        side, matrix = max(found, key=lambda pair: pair[0].sparsity(pair[1]))
    return complete(masked, base, side is inputs, matrix, side.sparsity(matrix))


def complete(masked: Tensor, base: Tensor, is_a: bool, matrix: Tensor, sparsity: float) -> Start:
    """Both masks from one of them."""
    rank = min(masked.shape[0], masked.shape[1] * masked.shape[2])
    if is_a:
        return Start(polar(towards_p(masked, base, matrix), rank), matrix, sparsity)
    rank = min(masked.shape[1], masked.shape[0] * masked.shape[2])
    return Start(matrix, polar(towards_a(masked, base, matrix), rank), sparsity)


def _signed(bases: Bases, signs: Tensor) -> Tensor:
    return (bases.masked * signs.to(bases.masked.dtype)) @ bases.public.T


def search_signs(shared: list[Bases], seed: int) -> Tensor:
    """The signs that make the matrices between all ``shared`` bases sparsest together."""
    pairs = [(each.masked.float(), each.public.float()) for each in shared]
    rank = pairs[0][0].shape[1]
    weights = []
    for masked, public in pairs:
        norms = masked.square() @ public.square().T
        weights.append(norms - norms.mean())

    def correlate(matrices: list[Tensor]) -> Tensor:
        return sum(((m.T @ each) * p.T).sum(1) for (m, p), each in zip(pairs, matrices, strict=True))  # type: ignore[return-value]

    # The diagonal knows nothing of signs, and only adds noise.
    diagonal = sum(
        ((m.square().T @ weight) * p.square().T).sum(1) for weight, (m, p) in zip(weights, pairs, strict=True)
    )

    def apply(vector: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(vector.reshape(-1).astype(np.float32))
        mixed = [weight * ((m * x) @ p.T) for weight, (m, p) in zip(weights, pairs, strict=True)]
        return (correlate(mixed) - diagonal * x).double().numpy()

    random = np.random.default_rng(seed)
    _, vectors = eigsh(
        LinearOperator((rank, rank), matvec=apply, dtype=np.float64),
        k=min(STARTS, rank - 1),
        which="LA",
        v0=random.standard_normal(rank),
        tol=1e-3,
    )
    best, most = torch.ones(rank), -1.0
    for first in [*vectors.T[::-1], *random.standard_normal((STARTS, rank))]:
        signs = _positive(torch.from_numpy(np.ascontiguousarray(first)).float())
        for _ in range(_ASCENT):
            matrices = [(m * signs) @ p.T for m, p in pairs]
            following = _positive(correlate([each**3 for each in matrices]))
            if torch.equal(following, signs):
                break
            signs = following
        value = sum(float(((m * signs) @ p.T).square().square().sum()) for m, p in pairs)
        if value > most:
            best, most = signs, value
    return best


def _positive(values: Tensor) -> Tensor:
    return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)


def band(bases: Bases, width: float) -> Tensor:
    """Weights of pairs of singular vectors: square roots of a Lorentz curve over the distance of singular values.

    That is the shape in which a small random perturbation spreads an eigenvector over its neighbours.
    """
    scale = width * bases.public_values.square().mean().sqrt()
    lorentz = 1 / (1 + ((bases.masked_values[:, None] - bases.public_values) / scale).square())
    even = (lorentz.sum(1, keepdim=True) * lorentz.sum(0, keepdim=True)).sqrt()
    return (lorentz / even).sqrt()


def banded(bases: Bases, width: float, seed: int) -> Tensor:
    """The sparsest nearly orthogonal matrix whose coordinates between both bases lie in a band.

    Returns:
        ``Ṽ X V₀ᵀ``, its polar factor: n~×n, float64.
    """
    masked, public, weights = bases.masked.float(), bases.public.float(), band(bases, width).float()
    rank = bases.rank
    norms = masked.square() @ weights.square() @ public.square().T
    norms -= norms.mean()

    def apply(vector: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(vector.reshape(rank, rank).astype(np.float32)) * weights
        return (weights * (masked.T @ (norms * (masked @ x @ public.T)) @ public)).double().numpy().ravel()

    first = np.random.default_rng(seed).standard_normal((rank, rank)) * weights.numpy()
    _, vectors = eigsh(
        LinearOperator((rank**2, rank**2), matvec=apply, dtype=np.float64),
        k=4,
        ncv=16,
        which="LA",
        v0=first.ravel(),
        tol=2e-2,
    )
    best, most = torch.zeros(len(masked), len(public)), -1.0
    for vector in vectors.T[::-1]:
        x = torch.from_numpy(vector.reshape(rank, rank).astype(np.float32)) * weights
        value = 0.0
        for _ in range(_ASCENT):
            matrix = polar(masked @ x @ public.T)
            before, value = value, float(matrix.square().square().sum())
            if value < before * (1 + 1e-4):
                break
            x = (masked.T @ matrix**3 @ public) * weights.square()
        if value > most:
            best, most = matrix, value
    return best.double()


def by_covariance(bases: Bases, masked: Tensor, public: Tensor) -> Tensor:
    """Signs from the covariance of inputs: ``Ṽᵀ C̃ Ṽ`` and ``V₀ᵀ C V₀`` agree but for them.

    Args:
        bases: Of the side of input features.
        masked: ``C̃ = X~ᵀ X~``, as the worker has it (orthogonal rows' masks cancel), d×d.
        public: ``C = Xᵀ X`` of inputs of the same distribution, d×d.

    Returns:
        An estimate of ``A``, d×d.
    """
    ours, theirs = bases.masked.T @ masked @ bases.masked, bases.public.T @ public @ bases.public
    product = _correlation(ours) * _correlation(theirs)
    product.fill_diagonal_(0.0)
    signs = _positive(torch.linalg.eigh(product).eigenvectors[:, -1])
    for _ in range(_ASCENT):
        following = _positive(product @ signs)
        if torch.equal(following, signs):
            break
        signs = following
    return _signed(bases, signs)


def _correlation(covariance: Tensor) -> Tensor:
    scale = covariance.diagonal().clamp_min(1e-300).sqrt()
    return covariance / (scale[:, None] * scale)

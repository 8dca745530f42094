"""Known data: the covariance of masked inputs lined up with what it must be in plain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tempo.audit import lab
from tempo.audit.attack import Attack, Control, Effort, Evidence, Figure, NotApplicable, Outcome
from tempo.audit.controls.toys import sparse_features
from tempo.audit.controls.weak import FeaturesReused
from tempo.audit.knowledge import Knowledge
from tempo.audit.samples import Samples
from tempo.audit.solvers.reference import plain_inputs
from tempo.audit.solvers.unmixing import Gathered, features_masked, flat, gather
from tempo.audit.transcript import View
from tempo.audit.truth import Truth

SCORES = 1 << 15
"""Rows that fourth cumulants are taken over, at the most."""

AXES: dict[Effort, int] = {"quick": 32, "full": 128}
"""Axes ``i`` of fourth cumulants, at the most: the strongest."""


@dataclass(frozen=True)
class Aligned:
    """An estimate of ``A`` (d×d) behind one product's calls."""

    gathered: Gathered
    A: Tensor


class DataAlignment(Attack):
    """Matches principal axes by order, and finds their signs by moments of odd and of fourth order."""

    name = "data-alignment"
    knows = frozenset({"architecture", "data"})
    tries = (
        "Computes the covariance of a product's inputs on data of the same distribution, matches its principal axes "
        "with those of the masked inputs by order, and finds signs by means and third moments (where rows are not "
        "mixed) and by fourth cumulants (which row mixing weakens but keeps): an estimate of A. Without the base "
        "checkpoint only of products whose input no weight has touched."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Aligned]:
        """For every product whose plain inputs the attacker can compute."""
        known = plain_inputs(view, knowledge)
        found = []
        for gathered in gather(view, effort):
            layer = gathered.calls[0].layer
            if layer in known and known[layer].shape[1] == gathered.x.shape[1]:
                found.append(Aligned(gathered, align(gathered.x, flat(known[layer]), effort)))
        if not found:
            raise NotApplicable("no product whose plain inputs are known has enough rows")
        return found

    def score(self, recovered: list[Aligned], view: View, truth: Truth) -> Outcome:
        """How near the estimate is to ``A``, and what it makes of inputs, for the product where it works best."""
        rows, inputs = 0.0, 0.0
        for aligned in recovered:
            known = truth.of(aligned.gathered.calls[0])
            A = known.matrix("A")
            rows = max(rows, float(nn.functional.cosine_similarity(aligned.A, A).abs().mean()))
            plain = flat(known["x"])
            undone = flat(features_masked(known)) @ aligned.A
            centred = [t - t.mean(0) for t in (plain, undone)]
            varies = centred[0].norm(dim=0) > 1e-6 * centred[0].norm(dim=0).max()
            same = nn.functional.cosine_similarity(centred[0], centred[1], dim=0)[varies]
            inputs = max(inputs, float(same.mean().abs()))
        return Outcome(
            figures=[
                Figure(
                    name="row correlation of A",
                    value=rows,
                    leaks=0.5,
                    chance=(2 / math.pi / len(recovered[0].A)) ** 0.5,
                    ceiling=1.0,
                    meaning="mean |cosine| between rows of the estimated and of the true mask of input features",
                ),
                Figure(
                    name="correlation of features",
                    value=inputs,
                    leaks=0.5,
                    chance=0.0,
                    ceiling=1.0,
                    meaning="mean correlation of each plain input feature with the one that the estimate makes of the "
                    "masked features",
                ),
            ]
        )

    def control(self) -> Control:
        """Skewed features of known covariance, rotated; rows left alone. The attacker has other rows."""
        model, attacker, victim = known_data()
        with lab.open_lab(masks=FeaturesReused()) as opened:
            opened.session.protect(model, base="secret")
            model(victim)
        knowledge = Knowledge(architecture=_Net, data=Samples(attacker, torch.zeros(len(attacker), dtype=torch.int64)))
        evidence = Evidence(opened.views[0], knowledge, opened.truth())
        return Control(evidence, "row correlation of A", 0.95, "issue: known-data covariance without row mixing")


class DataAlignmentBase(DataAlignment):
    """The same for all products, their inputs computed with the public weights."""

    name = "data-alignment-base"
    knows = frozenset({"architecture", "data", "base"})

    def control(self) -> Control:
        """The second layer of a network whose weights are public."""
        torch.manual_seed(0)
        base = _Net(depth=2)
        _, attacker, victim = known_data()
        with lab.open_lab(masks=FeaturesReused()) as opened:
            model = _Net(depth=2)
            model.load_state_dict(base.state_dict())
            opened.session.protect(model, base="secret", trusted=("layers.0",))
            model(victim)
        knowledge = Knowledge(
            architecture=lambda: _Net(depth=2),
            data=Samples(attacker, torch.zeros(len(attacker), dtype=torch.int64)),
            base=base.state_dict(),
            trusted=("layers.0",),
        )
        evidence = Evidence(opened.views[0], knowledge, opened.truth())
        return Control(evidence, "row correlation of A", 0.95, "red-team: base plus data: 0.99 at drift 0.5%")


def align(masked: Tensor, plain: Tensor, effort: Effort = "quick") -> Tensor:
    """Estimate orthogonal ``A`` with ``masked = L plain Aᵀ``, from rows×d samples of both.

    A row of ``x~`` is a mixture of rows under secret coefficients of either sign. So odd moments vanish, but fourth
    cumulants only shrink, by the sum of the coefficients' fourth powers, and keep their signs.
    """
    (scores, axes), (scores_plain, axes_plain) = _principal(masked), _principal(plain)
    odd = (_moments(scores) * _moments(scores_plain)).sum(0)
    agreement = torch.outer(odd, odd) / 10 + _fourth_order(scores, scores_plain, AXES[effort])
    agreement.fill_diagonal_(0)
    signs = _signs(torch.linalg.eigh(agreement)[1][:, -1])
    for _ in range(50):
        signs = _signs(agreement @ signs)
    A: Tensor = (axes * signs) @ axes_plain.T
    return A


def _principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of unit mean square along the principal axes, ascending, and the axes."""
    axes = torch.linalg.eigh(x.T @ x)[1]
    scores = x[:SCORES] @ axes
    return scores / scores.square().mean(0).sqrt().clamp_min(1e-12), axes


def _fourth_order(masked: Tensor, plain: Tensor, axes: int) -> Tensor:
    """How well cumulants ``cum(i, i, k, l)`` agree in sign, over the strongest ``axes``: d×d.

    In units of about their sampling error and at most ten of them, so that no outlier decides.
    """
    total = torch.zeros(masked.shape[1], masked.shape[1], dtype=torch.float64)
    covariances = [z.T @ z / len(z) for z in (masked, plain)]
    for i in range(max(0, len(total) - axes), len(total)):
        cumulants = []
        for z, c in zip((masked, plain), covariances, strict=True):
            cumulant = (z * z[:, i : i + 1] ** 2).T @ z / len(z) - c[i, i] * c - 2 * torch.outer(c[i], c[i])
            cumulants.append((cumulant * (len(z) ** 0.5 / 4)).clamp(-10, 10))
        total += cumulants[0] * cumulants[1]
    return total


def _signs(x: Tensor) -> Tensor:
    signs: Tensor = torch.where(x < 0, -1.0, 1.0).double()
    return signs


def known_data(width: int = 32, rows: int = 16384) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, the attacker's rows and the victim's, of one distribution with a spread spectrum."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    strength = 1.3 ** -torch.arange(width, dtype=torch.float64)
    attacker, victim = (
        ((sparse_features(rows, width, generator) * strength) @ mixing).float().view(-1, 64, width) for _ in range(2)
    )
    return _Net(width), attacker, victim


class _Net(nn.Module):
    """Linear layers with GELU between them."""

    def __init__(self, width: int = 32, depth: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(width, width), nn.GELU()) if i else nn.Linear(width, width) for i in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Rows."""
        y: Tensor = self.layers(x)
        return y


def _moments(scores: Tensor) -> Tensor:
    """First and third moments of each column (2×d), in units of their sampling error and at most ten of them."""
    powers: Tensor = torch.stack([scores, scores**3])
    errors = powers.std(1).clamp_min(1e-12) / len(scores) ** 0.5
    significance: Tensor = (powers.mean(1) / errors).clamp(-10, 10)
    return significance

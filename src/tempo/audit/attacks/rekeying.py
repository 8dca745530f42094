"""Links masks over a rekey: a weight that lived on a worker leaves it under one pair of masks and returns under others.

Nothing happens to the weight in between, nor to what its optimizer keeps of it. So the worker has the same matrices
twice: ``P M Aᵀ`` for the weight and each state, under the old masks and under the new ones. Signed permutations leave
magnitudes, which are matched; rotations leave singular vectors up to signs, and signs must make all else agree: the
other matrices, and second moments of inputs and of gradients. A cloak on each matrix is what stands against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempo.audit import lab
from tempo.audit.attack import Attack, Control, Effort, Evidence, NotApplicable, Outcome
from tempo.audit.attacks.gradients_joint import Link, common_signs, of_moments, relation
from tempo.audit.attacks.signatures import match, signs
from tempo.audit.attacks.singular_vectors import polar
from tempo.audit.controls.weak import small_mix
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers.unmixing import WIDTH, flat
from tempo.audit.transcript import Call, Rekey, View
from tempo.audit.truth import Truth
from tempo.schemes.single import SQUARES

REKEYS: dict[Effort, int] = {"quick": 1, "full": 200}
"""Of each product, the latest."""

SWEEPS = 25
"""Of Procrustes on each side in turn."""


class Rekeying(Attack):
    """Lays what was fetched under old masks on what was stored under new ones."""

    name = "rekeying"
    tries = (
        "Takes the weight and the optimizer's state as they left a worker under old masks and as they came back under "
        "new ones, matches magnitudes, or lays singular vectors on one another with signs from second moments of "
        "inputs and gradients: fresh masks become one mask reused, with nothing else known."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Link]:
        """For the last rekeys of every product."""
        found = []
        for layer in view.layers:
            first = view.of(layer)[0]
            if first.w.dim() == 2 and max(first.w.shape) <= 4 * WIDTH[effort]:
                found += [link(rekey) for rekey in view.rekeys(layer)[-REKEYS[effort] :]]
        if not found:
            raise NotApplicable("no linear product's weight came again under fresh masks")
        return found

    def score(self, recovered: list[Link], view: View, truth: Truth) -> Outcome:
        """How near the relations are to the true ones."""
        return relation(
            recovered,
            truth,
            misfit="what is left between the matrices under old and new masks, laid on one another; 0 means that they "
            "are the same, and no cloak lies on them",
        )

    def control(self) -> Control:
        """Momentum under the masks of `mix`, without a cloak."""
        recorded = resident(masks=small_mix(32))
        evidence = Evidence(recorded.views[0], Knowledge(), recorded.truth())
        return Control(evidence, "masks linked", 0.9, "brief: without a cloak singular vectors line up")


def resident(
    build: Callable[[list[Tensor]], torch.optim.Optimizer] = lambda w: torch.optim.SGD(w, 0.05, momentum=0.9),
    steps: int = 5,
    spectrum: float = 0.0,
    **fields: Any,
) -> lab.Lab:
    """Train a layer that lives on a worker, rekeyed every two steps, under one that is trusted.

    Args:
        build: Makes the optimizer of the layer's weight.
        steps: How many.
        spectrum: How fast the strengths of the inputs' principal axes fall: by this power of their number.
        fields: For `tempo.audit.lab.open_lab`.
    """
    torch.manual_seed(0)
    layer = nn.Linear(64, 96, bias=False)
    model = nn.Sequential(layer, nn.GELU(), nn.Linear(96, 10))
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    strengths = torch.arange(1, 65) ** -spectrum
    x = torch.randn(steps, 1024, 64, generator=generator).relu() * strengths @ axes.T
    labels = torch.randint(10, (steps, 1024), generator=generator)
    return lab.train(
        model,
        list(zip(x, labels, strict=True)),
        lambda net, inputs, targets: F.cross_entropy(net(inputs), targets),
        optimizer=build([layer.weight]),
        trusted=("2",),
        update="worker",
        rekey_rows=2048,
        **fields,
    )


def link(rekey: Rekey) -> Link:
    """Relate the old masks to the new ones."""
    names = [name for name in rekey.after if name in rekey.before]
    then, now = (
        torch.stack([tensors[name].double() / tensors[name].double().norm().clamp_min(1e-300) for name in names], 2)
        for tensors in (rekey.before, rekey.after)
    )
    signed = [number for number, name in enumerate(names) if name not in SQUARES]
    permuted = _permuted(then, now, signed)
    then, now = then[..., signed], now[..., signed]

    def left(guess: tuple[Tensor, Tensor]) -> float:
        A, P = guess
        return float((now - torch.einsum("ij,jbk,ab->iak", P, then, A)).norm() / now.norm())

    guesses = [permuted]
    for anchor in range(len(signed)):
        guesses += _rotated(then, now, anchor, *rekey.calls)
    A, P = min(guesses, key=left)
    return Link(rekey.calls[0][-1], rekey.calls[1][0], A, P, 0.0, left((A, P)))


def _permuted(then: Tensor, now: Tensor, signed: list[int]) -> tuple[Tensor, Tensor]:
    """``A`` and ``P`` if they are signed permutations: rows and columns of the same magnitudes."""
    rows, columns = match(now.abs(), then.abs())
    row_signs, column_signs = signs(now[..., signed], then[rows][:, columns][..., signed])
    A, P = (torch.zeros(size, size, dtype=torch.float64) for size in (len(columns), len(rows)))
    A[torch.arange(len(columns)), columns] = column_signs
    P[torch.arange(len(rows)), rows] = row_signs
    return A, P


def _rotated(
    then: Tensor, now: Tensor, anchor: int, old: list[Call], new: list[Call]
) -> Iterator[tuple[Tensor, Tensor]]:
    """``A`` and ``P`` if they are rotations: singular vectors of one matrix, signs from all, then Procrustes on all.

    With second moments, which hold where cloaks lie on the matrices, and then without, which is exact where none do.
    """
    (left, _, right), (left_new, _, right_new) = (
        torch.linalg.svd(each[..., anchor], full_matrices=False) for each in (then, now)
    )
    agreement = of_moments(old, new, "x", right.T, right_new.T) + of_moments(old, new, "g", left, left_new)
    for number in range(then.shape[2]):
        if number != anchor:  # U_newᵀ M_new V_new = s sᵀ ∘ Uᵀ M V
            product = (left.T @ then[..., number] @ right.T) * (left_new.T @ now[..., number] @ right_new.T)
            product = product + product.T
            agreement += product * (agreement.norm() / product.norm().clamp_min(1e-300))
    s = common_signs(agreement)
    A, P = (right_new.T * s) @ right, (left_new * s) @ left.T
    inputs, outputs = (
        [_moments(calls, role, len(mask)) for calls in (old, new)] for role, mask in (("x", A), ("g", P))
    )
    for weight in (1.0, 0.0):
        for _ in range(SWEEPS):
            A = polar(torch.einsum("iak,ij,jbk->ab", now, P, then) + weight * inputs[1] @ A @ inputs[0])
            P = polar(torch.einsum("iak,ab,jbk->ij", now, A, then) + weight * outputs[1] @ P @ outputs[0])
        yield A, P


def _moments(calls: list[Call], role: str, size: int) -> Tensor:
    """Second moments of everything that came in under one mask, of unit norm; zeros where nothing did."""
    found = [flat(x) for call in calls if (x := getattr(call, role)) is not None]
    moments = torch.zeros(size, size, dtype=torch.float64)
    for rows in found:
        moments += rows.T @ rows
    unit: Tensor = moments / moments.norm().clamp_min(1e-300)
    return unit

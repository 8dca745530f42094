"""The paper's measure: entropy of keys, and mutual information between masked and plain operands, element by element.

Tempo (Xu & Fang, arXiv 2401.11531). It says how much one masked number tells of one plain number. It does not bound
what all of them tell together, which is what the other attacks use: read it as the least that leaks.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from tempo.audit import lab
from tempo.audit.attack import Attack, Control, Effort, Evidence, Figure, NotApplicable, Outcome
from tempo.audit.knowledge import Knowledge
from tempo.audit.transcript import Call, View
from tempo.audit.truth import CallTruth, Truth, Which
from tempo.schemes.masks import Form, Mask
from tempo.schemes.sandwich import sandwich

Role = Literal["x", "w", "g"]
SIDES: dict[Role, tuple[tuple[Which, Form], tuple[Which, Form]]] = {
    "x": (("L", Form.PLAIN), ("A", Form.DUAL)),
    "w": (("P", Form.DUAL), ("A", Form.PLAIN)),
    "g": (("L", Form.DUAL), ("P", Form.PLAIN)),
}
"""Masks on rows and columns of each operand; see `tempo.schemes.masks`."""

BINS = 16
PAIRS = 200_000
ROWS: dict[Effort, int] = {"quick": 4096, "full": 16384}
FLOAT_BITS = 24
"""Resolution at which a parameter of a block is counted: a float32's significand."""


class Information(Attack):
    """Measures; recovers nothing."""

    name = "information"
    tries = (
        "Estimates the mutual information between single elements of masked and plain operands: at the same position, "
        "and between each masked element and the plain one with the largest weight in it; and counts key bits."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Call]:
        """The last call of every product that is not too large."""
        calls = [view.of(layer)[-1] for layer in view.layers]
        calls = [call for call in calls if len(call.x) <= ROWS[effort]]
        if not calls:
            raise NotApplicable(f"no product of at most {ROWS[effort]} rows")
        return calls

    def score(self, recovered: list[Call], view: View, truth: Truth) -> Outcome:
        """The operand that tells most about itself, and the product with the fewest key bits."""
        same, matched, operand = 0.0, 0.0, ""
        bits: list[tuple[float, float]] = []
        for call in recovered:
            known = truth.of(call)
            bits.append((mask_bits(known.mask("A")) + mask_bits(known.mask("P")), mask_bits(known.mask("L"))))
            for role in SIDES:
                masked = getattr(call, role)
                if masked is None or known.get(role) is None or (role == "w" and call.public):
                    continue
                here, there = element_shares(masked, known, role)
                if max(here, there) >= max(same, matched):
                    same, matched, operand = here, there, f"{role} of {truth.name(call.layer)}"
        features, rows = min(bits)
        return Outcome(
            figures=[
                Figure(
                    name="information in single elements",
                    value=max(same, matched),
                    leaks=0.1,
                    chance=0.0,
                    ceiling=1.0,
                    meaning="mutual information between a masked element and a plain one, as a share of the plain "
                    f"one's entropy ({BINS} levels): the larger of the next two, of the operand with most ({operand})",
                ),
                Figure(
                    name="at the same position",
                    value=same,
                    chance=0.0,
                    ceiling=1.0,
                    meaning="between elements at the same row and column",
                ),
                Figure(
                    name="at the best position",
                    value=matched,
                    chance=0.0,
                    ceiling=1.0,
                    meaning="between each masked element and the plain one that weighs most in it, were the key's "
                    "permutations known",
                ),
                Figure(
                    name="key bits of features",
                    value=features,
                    higher_leaks=False,
                    meaning="log2 of the number of masks A and P that can be told apart, blocks counted to "
                    f"{FLOAT_BITS} bits a parameter, of the product with fewest. All are expanded from one key of 256 "
                    "bits: no more than that is random",
                ),
                Figure(
                    name="key bits of rows",
                    value=rows,
                    higher_leaks=False,
                    meaning="the same of L, which is fresh for every call",
                ),
            ]
        )

    def control(self) -> Control:
        """A product in plain."""
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        with lab.open_lab(scheme="insecure-plain") as opened:
            opened.session.protect(model, base="secret")
            model(torch.randn(256, 64)).square().sum().backward()
            opened.session.unprotect(model)
        evidence = Evidence(opened.views[0], Knowledge(), opened.truth())
        return Control(evidence, "information in single elements", 0.98, "insecure-plain: everything")


def element_shares(masked: Tensor, known: CallTruth, role: Role) -> tuple[float, float]:
    """Share of a plain element's entropy in the masked one at its position, and in the one where it weighs most."""
    plain = _levelled(known[role].double())
    masked = _levelled(masked.double())
    both = [min(a, b) for a, b in zip(plain.shape[:2], masked.shape[:2], strict=True)]
    here = mutual_information(plain[: both[0], : both[1]], masked[: both[0], : both[1]])
    row, column = (_heaviest(known.mask(which), form, size) for (which, form), size in zip(SIDES[role], masked.shape))
    rows = torch.nonzero(row < len(plain)).flatten()  # shield rows have no plain ones
    columns = torch.nonzero(column < plain.shape[1]).flatten()
    there = mutual_information(plain[row[rows]][:, column[columns]], masked[rows][:, columns])
    return here, there


def mutual_information(a: Tensor, b: Tensor) -> float:
    """Between paired elements, over the entropy of ``a``: from counts in equally frequent bins, bias taken off.

    Miller and Madow (1955): K occupied cells add (K - 1) / 2N nats to each entropy.
    """
    a, b = a.flatten(), b.flatten()
    if len(a) > PAIRS:
        chosen = torch.randint(len(a), (PAIRS,), generator=torch.Generator().manual_seed(0))
        a, b = a[chosen], b[chosen]
    x, y = _binned(a), _binned(b)
    entropy_x, entropy_y, joint = _entropy(x), _entropy(y), _entropy(x * BINS + y)
    return max(0.0, (entropy_x + entropy_y - joint) / entropy_x) if entropy_x > 0 else 0.0


def mask_bits(mask: Mask) -> float:
    """log2 of how many masks of this shape can be told apart.

    Of a generalised permutation: n! orders, times the range of its scales (up to the largest seen). Of blocks: n! for
    every permutation, less orders within a block, which a Haar-distributed block absorbs on both sides, less orders of
    equal blocks; and the volume of the orthogonal group in cells of side 2^-24.
    """
    bits = 0.0
    for gather in mask.gathers:
        bits += _log2_factorial(len(gather.index))
        if gather.scale is not None:
            bits += len(gather.index) * math.log2(max(float(gather.scale.max()), 1.0))
    for stage in mask.blocks:
        for batch in stage.batches:
            count, side = batch.shape[:2]
            bits += count * (_orthogonal_bits(side) - 2 * _log2_factorial(side)) - _log2_factorial(count)
    return bits


def _orthogonal_bits(side: int) -> float:
    """log2 of the volume of O(s), ∏ 2 π^{k/2} / Γ(k/2) for k = 1..s, in cells of side 2^-24 in s(s-1)/2 dimensions."""
    volume = sum(1 + (k / 2) * math.log2(math.pi) - math.lgamma(k / 2) / math.log(2) for k in range(1, side + 1))
    return volume + FLOAT_BITS * side * (side - 1) / 2


def _log2_factorial(n: int) -> float:
    return math.lgamma(n + 1) / math.log(2)


def _heaviest(mask: Mask, form: Form, size: int) -> Tensor:
    """For each masked row (or column), the plain one with the largest coefficient in it."""
    operator = mask.operator(form)
    if operator is None:
        return torch.arange(size)
    unit = torch.eye(operator.size, dtype=torch.float64)
    coefficients = torch.empty_like(unit)
    sandwich(unit, operator, None, [coefficients])
    return coefficients.abs().argmax(1)


def _levelled(t: Tensor) -> Tensor:
    """Without scales of rows and columns, which say nothing of single elements."""
    for _ in range(3):
        for axis in (0, 1):
            others = [other for other in range(t.dim()) if other != axis]
            t = t / t.square().mean(others, keepdim=True).sqrt().clamp_min(1e-30)
    return t


def _binned(t: Tensor) -> Tensor:
    """Numbers of equally frequent bins; equal values share one."""
    ordered = t.sort().values
    edges = ordered[[len(t) * number // BINS for number in range(1, BINS)]].unique()
    return torch.bucketize(t, edges, right=True)


def _entropy(labels: Tensor) -> float:
    counts = labels.bincount().double()
    counts = counts[counts > 0]
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum() + (len(counts) - 1) / (2 * counts.sum())) / math.log(2)

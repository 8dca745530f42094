"""Gradient leakage: ``dw~ = (P Gᵀ) (X A^-1)`` of a small batch has its inputs in its rows, and labels in its signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempo.audit import lab
from tempo.audit.attack import Attack, Control, Effort, Evidence, Figure, NotApplicable, Outcome
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers.unmixing import features_masked
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth

PARALLEL = 1 - 1e-5
"""Cosine of rows of ``dw~`` that stem from one input, rounded."""


@dataclass(frozen=True)
class Leaked:
    """What one call's ``dw~`` gives away.

    Attributes:
        call: Which call.
        inputs: Candidates for inputs (k×d), each up to a factor.
        rank: Of ``dw~``: how many inputs there were, if fewer than features.
        present: For each output feature, whether its weights' gradient is negative in sum; as a class's is that
            occurs, where inputs are positive.
    """

    call: Call
    inputs: Tensor
    rank: int
    present: Tensor


class GradientLeakage(Attack):
    """Reads inputs off the weight gradient, which the worker has computed, wherever the weight is updated."""

    name = "gradient-leakage"
    tries = (
        "Takes rows of a product's weight gradient for inputs: an output feature that a single sample of the batch "
        "excites has that sample for its gradient, up to a factor; signs of the last layer's rows tell which classes "
        "occur."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Leaked]:
        """From every product's last gradient (all, with full effort)."""
        found = []
        for layer in view.layers:
            calls = [call for call in view.of(layer) if call.dw is not None and call.x.dim() == 2]
            found += [_read(call) for call in (calls if effort == "full" else calls[-1:])]
        if not found:
            raise NotApplicable("no weight gradient of a linear layer in this transcript")
        return found

    def score(self, recovered: list[Leaked], view: View, truth: Truth) -> Outcome:
        """Shares of the inputs that were found: as they are, and under the mask of features."""
        plain, masked, labels, ranks = 0.0, 0.0, 0.5, []
        for leaked in recovered:
            known = truth.of(leaked.call)
            live = known["g"].abs().amax(1) > 0
            plain = max(plain, _found(known["x"].double()[live], leaked.inputs))
            masked = max(masked, _found(features_masked(known)[live], leaked.inputs))
            ranks.append(abs(leaked.rank - int(torch.linalg.matrix_rank(known["g"].double().T @ known["x"].double()))))
        last = recovered[-1]
        g, occurs = truth.of(last.call)["g"], None
        # A row of a classifier's gradient under cross-entropy sums to zero; a class that occurs has negative entries.
        if float(g.sum(1).abs().max()) < 1e-3 * float(g.abs().max()) and len(g.T) == len(last.present):
            occurs = (g < 0).any(0)
            labels = _balanced_accuracy(last.present, occurs)
        figures = [
            Figure(
                name="inputs found",
                value=plain,
                leaks=0.1,
                chance=0.0,
                ceiling=1.0,
                meaning="share of a batch's rows that a row of the weight gradient is parallel to (|cos| > 0.99)",
            ),
            Figure(
                name="inputs found under the mask of features",
                value=masked,
                chance=0.0,
                ceiling=1.0,
                meaning="the same of rows of X A^-1: freed of other rows, features still masked",
            ),
            Figure(
                name="error of the number of rows",
                value=float(min(ranks)),
                higher_leaks=False,
                meaning="difference of the ranks of the masked and the plain gradient; 0: a small batch's size shows",
            ),
        ]
        if occurs is not None:
            figures.append(
                Figure(
                    name="classes told to occur",
                    value=labels,
                    leaks=0.9,
                    chance=0.5,
                    ceiling=1.0,
                    meaning="balanced accuracy of telling from signs which classes occur in the batch",
                )
            )
        return Outcome(figures=figures)

    def control(self) -> Control:
        """Four samples in plain: of a wide ReLU layer, some features are excited by one sample alone."""
        recorded = tiny_batch(4, scheme="insecure-plain")
        evidence = Evidence(recorded.views[0], Knowledge(), recorded.truth())
        return Control(evidence, "inputs found", 1.0, "analytic leakage: small batches in plain are read exactly")


def tiny_batch(count: int, width: int = 256, **fields: object) -> lab.Lab:
    """One training step of a ReLU network of 64 inputs and ten classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    x, labels = torch.randn(count, 64), torch.arange(count) % 10
    return lab.train(model, [(x, labels)], lambda m, x, y: F.cross_entropy(m(x), y), **fields)  # type: ignore[arg-type]


def _read(call: Call) -> Leaked:
    """Rows of ``dw~`` that several output features share, or all of them where there is one input."""
    assert call.dw is not None  # noqa: S101 - chosen so
    dw = call.dw.double()
    values = torch.linalg.svdvals(dw)
    rank = int((values > 8 * max(dw.shape) * torch.finfo(call.dw.dtype).eps * values[0].clamp_min(1e-300)).sum())
    present = dw.sum(1) < 0
    norms = dw.norm(dim=1)
    alive = dw[norms > 1e-9 * norms.max().clamp_min(1e-300)]
    if not len(alive):
        return Leaked(call, dw[:0], 0, present)
    unit = F.normalize(alive)
    alike = (unit @ unit.T).abs() > PARALLEL
    shared = torch.nonzero(alike.sum(1) > 1).flatten()
    first = alike[shared].int().argmax(1).unique() if len(shared) else shared
    return Leaked(call, unit[first], rank, present)


def _found(wanted: Tensor, candidates: Tensor) -> float:
    """Share of ``wanted`` that a candidate is parallel to, and nearer to than to another of them."""
    if not len(candidates) or not len(wanted):
        return 0.0
    wanted = F.normalize(wanted)
    best = (wanted @ candidates.T).abs().amax(1)
    alike = (wanted @ wanted.T).abs().fill_diagonal_(0).amax(1)
    return float(((best > 0.99) & (1 - best <= (0.1 * (1 - alike)).clamp_min(1e-9))).double().mean())


def _balanced_accuracy(guess: Tensor, actual: Tensor) -> float:
    """Mean of the accuracies on both answers; 0.5 where there is only one."""
    if bool(actual.all()) or not bool(actual.any()):
        return 0.5
    return float(((guess[actual]).double().mean() + (~guess[~actual]).double().mean()) / 2)

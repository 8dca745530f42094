"""Links fresh masks over steps by the weight update: ``w~ - η dw~`` is the next weight under the last masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempo.audit import lab
from tempo.audit.attack import Attack, Control, Effort, Evidence, Figure, NotApplicable, Outcome
from tempo.audit.attacks.signatures import sign
from tempo.audit.controls.weak import Uncovered
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers.unmixing import WIDTH, flat
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth

PAIRS: dict[Effort, int] = {"quick": 2, "full": 200}


@dataclass(frozen=True)
class Link:
    """Estimates of how the masks of one step and the next relate: ``A_next A_lastᵀ`` and ``P_next P_lastᵀ``.

    ``rate`` is the learning rate that fits, ``misfit`` what is left between the spectra of the two weights, relative to
    how far one step moved the spectrum.
    """

    last: Call
    next: Call
    A: Tensor
    P: Tensor
    rate: float
    misfit: float


class GradientsJoint(Attack):
    """Uses ``w~``, ``dw~``, ``x~`` and ``g~`` of two steps together."""

    name = "gradients-joint"
    tries = (
        "With plain gradient descent the next weight is the last one less the gradient, both of which the worker has "
        "under the last masks: so it has the next weight under two pairs of masks. Singular vectors give the relation "
        "of the masks up to signs, and second moments of inputs and of gradients give signs: fresh masks become one "
        "mask reused, with nothing else known."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Link]:
        """For pairs of successive weights of the linear products."""
        found = []
        for layer in view.layers:
            steps: dict[int, list[Call]] = {}
            for call in view.of(layer):
                if call.dw is not None and call.w.dim() == 2 and max(call.w.shape) <= 4 * WIDTH[effort]:
                    steps.setdefault(call.weight, []).append(call)
            pairs = list(zip(steps.values(), list(steps.values())[1:], strict=False))[-PAIRS[effort] :]
            found += [link(last, following) for last, following in pairs]
        if not found:
            raise NotApplicable("no linear product with gradients under two successive weights")
        return found

    def score(self, recovered: list[Link], view: View, truth: Truth) -> Outcome:
        """How near the relations are to the true ones: mean over steps, for the product where it works best."""
        return relation(
            recovered,
            truth,
            misfit="difference of the spectra after the best learning rate, relative to how far one step moved them; 0 "
            "means that the optimizer is plain gradient descent and nothing else was added",
        )

    def control(self) -> Control:
        """Gradient descent under the masks of `mix`, fresh at every step, inputs with a structure of their own."""
        recorded = descend(Uncovered())
        evidence = Evidence(recorded.views[0], Knowledge(), recorded.truth())
        return Control(evidence, "masks linked", 0.9, "w - η dw is the next weight exactly")


def descend(masks: Uncovered, optimizer: str = "sgd", steps: int = 3) -> lab.Lab:
    """Train two layers for a few steps on inputs with common causes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator)
    batches = [
        (torch.randn(1024, 64, generator=generator) @ mixing / 8, torch.randint(10, (1024,), generator=generator))
        for _ in range(steps)
    ]
    chosen = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), 0.1),
        "adam": lambda: torch.optim.Adam(model.parameters(), 1e-2),
    }[optimizer]()
    return lab.train(
        model, batches, lambda m, x, y: F.cross_entropy(m(x), y), masks=masks, trusted=("2",), optimizer=chosen
    )


def relation(recovered: list[Link], truth: Truth, misfit: str) -> Outcome:
    """How near estimates are to the true relations of masks: mean over steps, for the product where it works best."""
    rows: dict[int, list[tuple[float, float, float]]] = {}
    for found in recovered:
        last, following = truth.of(found.last), truth.of(found.next)
        A, P = (following.matrix(which) @ torch.linalg.inv(last.matrix(which)) for which in ("A", "P"))
        pairs = ((found.A, A), (found.P, P))
        inputs, outputs = (float(F.cosine_similarity(guess, true).abs().mean()) for guess, true in pairs)
        rows.setdefault(found.last.layer, []).append((inputs, outputs, found.misfit))
    means = [torch.tensor(values, dtype=torch.float64).mean(0).tolist() for values in rows.values()]
    A_row, P_row, left = max(means)
    chance = max((2 / math.pi / len(found.A)) ** 0.5 for found in recovered)
    return Outcome(
        figures=[
            Figure(
                name="masks linked",
                value=A_row,
                leaks=0.5,
                chance=chance,
                ceiling=1.0,
                meaning="mean |cosine| between rows of the estimated and the true relation of old and new masks of "
                "input features; 1 makes fresh masks as good as one that is reused",
            ),
            Figure(
                name="masks of outputs linked",
                value=P_row,
                leaks=0.5,
                chance=chance,
                ceiling=1.0,
                meaning="the same of output features; √(inputs / outputs) at the most where there are more outputs",
            ),
            Figure(name="misfit", value=left, higher_leaks=False, chance=1.0, meaning=misfit),
        ]
    )


def link(last: list[Call], following: list[Call]) -> Link:
    """Relate the masks of the calls of one weight to those of the next."""
    newest = [call for call in last if call.updated is last[-1].updated]  # of a weight that changed under its masks
    w, w_next = newest[0].w.double(), following[0].w.double()
    dw = torch.stack([call.dw.double() for call in newest if call.dw is not None]).sum(0)
    rate, misfit = _rate(w, dw, w_next)
    left, _, right = torch.linalg.svd(w - rate * dw, full_matrices=False)
    left_next, _, right_next = torch.linalg.svd(w_next, full_matrices=False)
    # Both are one matrix M: P_last M A_lastᵀ and P_next M A_nextᵀ. Signs must make second moments of X (and G) agree.
    agreement = of_moments(last, following, "x", right.T, right_next.T)
    agreement += of_moments(last, following, "g", left, left_next)
    signs = common_signs(agreement)
    return Link(last[0], following[0], (right_next.T * signs) @ right, (left_next * signs) @ left.T, rate, misfit)


def _rate(w: Tensor, dw: Tensor, w_next: Tensor) -> tuple[float, float]:
    """The learning rate under which the spectra agree best, and the misfit that is left."""
    wanted = torch.linalg.svdvals(w_next)
    moved = float((torch.linalg.svdvals(w) - wanted).norm()) or 1e-300
    unit = float(w.norm() / dw.norm().clamp_min(1e-300))

    def misfit(rate: float) -> float:
        return float((torch.linalg.svdvals(w - rate * dw) - wanted).norm()) / moved

    rates = [unit * 10 ** (-power / 4) for power in range(25)]
    best = min(rates, key=misfit)
    low, high = best / 1.8, best * 1.8
    for _ in range(30):  # golden section
        third = 0.381966 * (high - low)
        if misfit(low + third) < misfit(high - third):
            high -= third
        else:
            low += third
    best = (low + high) / 2
    return best, misfit(best)


def common_signs(agreement: Tensor) -> Tensor:
    """Signs ``s`` that make ``sᵀ agreement s`` large; the diagonal, which tells nothing, is set to zero."""
    agreement.fill_diagonal_(0)
    signs = sign(torch.linalg.eigh(agreement)[1][:, -1])
    for _ in range(50):
        signs = sign(agreement @ signs)
    return signs


def of_moments(last: list[Call], following: list[Call], role: str, basis: Tensor, basis_next: Tensor) -> Tensor:
    """Products of correlations between singular directions, in the one step and in the next."""
    correlations = []
    for calls, vectors in ((last, basis), (following, basis_next)):
        found = [flat(getattr(call, role)) for call in calls if getattr(call, role) is not None]
        if not found:
            return torch.zeros(basis.shape[1], basis.shape[1], dtype=basis.dtype)
        scores = torch.cat(found) @ vectors  # about zero, not their mean: row masks leave that in second moments alone
        correlations.append(F.normalize(scores, dim=0).T @ F.normalize(scores, dim=0))
    return correlations[0] * correlations[1]

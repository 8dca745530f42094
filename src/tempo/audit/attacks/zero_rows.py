"""Rank attack on zero rows of ``G``: a block with one live row shows its column of ``L``. Dead columns likewise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempo.audit import lab
from tempo.audit.attack import Attack, Control, Effort, Evidence, Figure, NotApplicable, Outcome
from tempo.audit.controls.toys import ClassTokenNet
from tempo.audit.controls.weak import Uncovered
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers.unmixing import features_masked
from tempo.audit.transcript import Call, View
from tempo.audit.truth import CallTruth, Truth

PARALLEL = 1 - 1e-5
"""Cosine of rows that are one row, rounded: even in bfloat16, rounding leaves 1 - 1e-6."""

NEARLY = 0.98
"""Cosine of rows of a block in which one row of ``G`` outweighs the others."""

ROWS: dict[Effort, int] = {"quick": 1 << 15, "full": 1 << 16}
PAIRS = 1 << 13
"""Rows of ``x~`` that are compared with each other, at the most."""


@dataclass(frozen=True)
class Isolated:
    """What one call gave away, all under the mask of features still.

    Attributes:
        call: Which one.
        rows: Candidates for single rows of ``X A^-1``, from blocks with one live row.
        nearly: The same from blocks with one dominating row.
        span: Orthonormal basis of the span of all live rows of ``X A^-1``, where ``g~`` is of low rank; else None.
        dead: Candidates for columns of ``A`` of input features that are always zero.
    """

    call: Call
    rows: Tensor
    nearly: Tensor
    span: Tensor | None
    dead: Tensor


class ZeroRows(Attack):
    """Finds rows of ``g~`` that are multiples of each other, and undoes the row mixing there."""

    name = "zero-rows"
    tries = (
        "Looks for blocks of rows in which only one row of the gradient is not zero, as with class-token pooling, "
        "masked labels or padding: all masked rows of such a block are multiples of one row and show a column of L, "
        "which takes that one row out of the mixture X~. Features that are always zero show columns of A alike."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Isolated]:
        """From the last call of every product (from all calls, with full effort)."""
        found = []
        for layer in view.layers:
            calls = [call for call in view.of(layer) if call.g is not None and call.x.shape[0] <= ROWS[effort]]
            found += [isolate(call) for call in (calls if effort == "full" else calls[-1:])]
        if not found:
            raise NotApplicable(f"no backward pass of at most {ROWS[effort]} rows in this transcript")
        return found

    def score(self, recovered: list[Isolated], view: View, truth: Truth) -> Outcome:
        """Shares of rows and columns that stand alone, of the product where it went worst."""
        shares: dict[str, float] = dict.fromkeys(("rows", "nearly", "span", "dead"), 0.0)
        residuals = []
        for isolated in recovered:
            known = truth.of(isolated.call)
            live = live_rows(known)
            shares["rows"] = max(shares["rows"], _share(isolated.rows, live, 0.999))
            shares["nearly"] = max(shares["nearly"], _share(isolated.nearly, live, 0.95))
            if isolated.span is not None:
                unit = F.normalize(live)
                residual = (unit - unit @ isolated.span @ isolated.span.T).norm(dim=1)
                residuals.append(float(residual.median()))
                shares["span"] = max(shares["span"], float((residual < 0.01).double().mean()))
            dead = known["x"].double().flatten(2).abs().sum((0, 2)) if known["x"].dim() > 2 else known["x"].abs().sum(0)
            columns = known.matrix("A")[:, dead == 0].T
            shares["dead"] = max(shares["dead"], _share(isolated.dead, columns, 0.999))
        figures = [
            Figure(
                name="live rows isolated",
                value=shares["rows"],
                leaks=0.05,
                chance=0.0,
                ceiling=1.0,
                meaning="Share of inputs' rows (of those whose gradient is not zero) that the worker takes out of the "
                "row mixture exactly, |cos| > 0.999; features stay mixed",
            ),
            Figure(
                name="live rows nearly isolated",
                value=shares["nearly"],
                leaks=0.05,
                chance=0.0,
                ceiling=1.0,
                meaning="The same with |cos| > 0.95, from blocks in which one row outweighs the others",
            ),
            Figure(
                name="live rows in a known span",
                value=shares["span"],
                leaks=0.5,
                chance=0.0,
                ceiling=1.0,
                meaning="Share of those rows that lie in a subspace that the worker knows, of less than three quarters "
                "of all features",
            ),
            Figure(
                name="dead columns isolated",
                value=shares["dead"],
                leaks=0.05,
                chance=0.0,
                ceiling=1.0,
                meaning="Share of input features that are always zero whose column of A the worker has",
            ),
        ]
        if residuals:
            figures.append(
                Figure(
                    name="residual of live rows in the span",
                    value=min(residuals),
                    higher_leaks=False,
                    meaning="What is left of them outside that subspace, relative; 0 means that it is exact",
                )
            )
        return Outcome(figures=figures)

    def control(self) -> Control:
        """A transformer that classifies by its class token, rows mixed once in blocks of 32, nothing covered."""
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        # Long sequences keep chance out: two class tokens seldom meet in one block.
        model = ClassTokenNet(width=32)
        tokens = torch.randn(32, 783, 32, generator=generator) + 2 * torch.randn(32, 1, 32, generator=generator)
        labels = torch.randint(10, (32,), generator=generator)
        recorded = lab.train(
            model, [(tokens, labels)], _loss, masks=Uncovered(32, 32), trusted=("qkv.*", "up.*", "out.*", "head")
        )
        evidence = Evidence(recorded.views[0], Knowledge(), recorded.truth())
        return Control(evidence, "live rows isolated", 0.6, "red-team: 46 of 64 class-token rows at r=32, one round")


def isolate(call: Call) -> Isolated:
    """Take single rows out of ``x~``."""
    g, x = call.g, call.x
    assert g is not None  # noqa: S101 - chosen so
    g, x = g.double().flatten(1), x.double().flatten(1)
    rows = _combine(g, x, PARALLEL)
    if len(x) <= PAIRS:  # rows of zeros in X do the same
        rows = torch.cat([rows, _combine(x, x, PARALLEL)])
    return Isolated(call, rows, torch.cat([rows, _combine(g, x, NEARLY)]), _span(g, x), _dead_columns(call.x))


def live_rows(known: CallTruth) -> Tensor:
    """Rows of ``X A^-1`` whose gradient is not zero (all, where none is zero)."""
    live = known["g"].flatten(1).abs().amax(1) > 0
    return features_masked(known)[live].flatten(1)


def _combine(source: Tensor, x: Tensor, threshold: float) -> Tensor:
    """For every group of parallel rows of ``source``, the combination of rows of ``x`` that it singles out.

    In a block with one live row ``j``, row ``i`` of ``g~ = L^-T G Pᵀ`` is ``(L^-T)_ij`` times one vector; and
    ``Σ_i (L^-T)_ij x~_i`` is row ``j`` of ``L^-1 x~ = X A^-1``.
    """
    norms = source.norm(dim=1)
    alive = torch.nonzero(norms > 1e-12 * norms.max().clamp_min(1e-300)).flatten()
    alone = len(alive) < len(source)  # rows without mixing: zeros stay, and others are single as they are
    unit = (source[alive] / norms[alive, None]).float()
    first = torch.cat([((part @ unit.T).abs() > threshold).int().argmax(1) for part in unit.split(1024)])
    found = []
    for label, count in zip(*torch.unique(first, return_counts=True), strict=True):
        if count == 1 and not alone:
            continue
        group = alive[first == label]
        block = source[group]
        found.append(torch.linalg.eigh(block @ block.T)[1][:, -1] @ x[group])
    return torch.stack(found) if found else x[:0]


def _span(g: Tensor, x: Tensor) -> Tensor | None:
    """Basis (d×k) of the live rows' span: columns of ``g~`` span the live columns of ``L^-T``, any number of rounds.

    None where it is not much smaller than the span of all rows, which is known in any case.
    """
    left, values, _ = torch.linalg.svd(g, full_matrices=False)
    spread = torch.linalg.svdvals(x)
    rank, whole = (int((found > 1e-5 * found[:1]).sum()) for found in (values, spread))
    if rank == 0 or rank >= 0.75 * min(whole, g.shape[1]):
        return None
    basis: Tensor = torch.linalg.qr((left[:, :rank].T @ x).T)[0]
    return basis


def _dead_columns(x: Tensor) -> Tensor:
    """Null vectors of ``x~``, told apart where their blocks do not overlap: columns of ``A``, up to length and sign."""
    flat = x.double() if x.dim() == 2 else x.double().movedim(1, -1).flatten(0, -2)
    width = flat.shape[1]
    if width > 1024 or len(flat) < width:
        return flat[:0]
    values, vectors = torch.linalg.eigh(flat.T @ flat)
    rounding = (64 * torch.finfo(x.dtype).eps) ** 2
    null = vectors[:, values < rounding * values.mean()]
    projector = (null @ null.T).abs()
    joined = projector > 1e-3
    found, seen = [], torch.zeros(width, dtype=torch.bool)
    for start in torch.nonzero(projector.diagonal() > 1e-3).flatten().tolist():
        if seen[start]:
            continue
        block = joined[start]
        while not torch.equal(block, grown := joined[block].any(0) | block):
            block = grown
        seen |= block
        values, inner = torch.linalg.eigh((null @ null.T)[block][:, block])
        if int((values > 0.5).sum()) == 1:
            column = flat.new_zeros(width)
            column[block] = inner[:, -1]
            found.append(column)
    return torch.stack(found) if found else flat[:0]


def _share(candidates: Tensor, wanted: Tensor, threshold: float) -> float:
    """Share of ``wanted`` rows that some candidate is parallel to, and ten times closer than other wanted rows are."""
    if not len(candidates) or not len(wanted):
        return 0.0
    wanted = F.normalize(wanted)
    best = (wanted @ F.normalize(candidates).T).abs().amax(1)
    alike = (wanted @ wanted.T).abs().fill_diagonal_(0).amax(1)
    return float(((best > threshold) & (1 - best <= (0.1 * (1 - alike)).clamp_min(1e-9))).double().mean())


def _loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x), labels)

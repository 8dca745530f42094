"""Span test: a known picture is recognised exactly where a batch's masked maps span less than all pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tempo.audit.attack import Attack, Control, Effort, Evidence, Figure, Outcome
from tempo.audit.attacks.spatial_ica import raw_images, spatial
from tempo.audit.knowledge import Knowledge
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth

MAPS: dict[Effort, int] = {"quick": 2048, "full": 16384}


@dataclass(frozen=True)
class Basis:
    """Orthonormal basis (pixels×k) of what one call's maps span."""

    call: Call
    span: Tensor


class Span(Attack):
    """Projects pictures on the span of the maps that the worker saw: what was in the batch leaves nothing."""

    name = "span"
    tries = (
        "Asks of a picture (or of one channel's map) that the attacker has at hand whether it was in the batch: masks "
        "of images and channels keep the span of a batch's maps, whatever they mix."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Basis]:
        """The span of each convolution's maps."""
        return [Basis(call, basis(call.x)) for call in spatial(view, MAPS[effort])]

    def score(self, recovered: list[Basis], view: View, truth: Truth) -> Outcome:
        """Tell members from their own mirror images, which are as likely and were not in the batch."""
        best, residual, mirrored = 0.0, 1.0, 1.0
        for found in recovered:
            members = truth.of(found.call)["x"].double().flatten(0, 1)
            inside = left_over(members, found.span)
            outside = left_over(members.flip(-1), found.span)
            advantage = _advantage(inside, outside)
            if advantage >= best:
                best, residual, mirrored = advantage, float(inside.max()), float(outside.median())
        return Outcome(
            figures=[
                Figure(
                    name="members told from others",
                    value=best,
                    leaks=0.9,
                    chance=0.0,
                    ceiling=1.0,
                    meaning="share of members recognised less share of others taken for members, at the best threshold",
                ),
                Figure(
                    name="residual of members",
                    value=residual,
                    higher_leaks=False,
                    meaning="largest part of a member that lies outside the span, relative; 0 means recognised exactly",
                ),
                Figure(
                    name="residual of others",
                    value=mirrored,
                    meaning="the same of mirror images, median: what a picture leaves that was not in the batch",
                ),
            ]
        )

    def control(self) -> Control:
        """Sixteen raw images of 40×40 pixels, all mixed with all."""
        recorded = raw_images(16, 40)
        evidence = Evidence(recorded.views[0], Knowledge(), recorded.truth())
        return Control(evidence, "residual of members", 1e-12, "red-team: < 1e-12 while batch × channels < H × W")


def basis(x: Tensor) -> Tensor:
    """Orthonormal basis of the maps in N×C×…, directions of rounding left out."""
    maps = x.double().flatten(0, 1).flatten(1)
    _, values, right = torch.linalg.svd(maps, full_matrices=False)
    kept: Tensor = right[values > 8 * torch.finfo(x.dtype).eps * values[0]].T
    return kept


def left_over(maps: Tensor, span: Tensor) -> Tensor:
    """Norm of each map's part outside the span, relative to the map's; 1 for a map of zeros."""
    flat = maps.flatten(1)
    norms = flat.norm(dim=1)
    rest = (flat - flat @ span @ span.T).norm(dim=1)
    return torch.where(norms > 0, rest / norms.clamp_min(1e-300), 1.0)


def _advantage(inside: Tensor, outside: Tensor) -> float:
    """Largest difference of the shares below a threshold."""
    thresholds = torch.cat([inside, outside])
    shares = [(part[None] <= thresholds[:, None]).double().mean(1) for part in (inside, outside)]
    return float((shares[0] - shares[1]).max())

"""Spatial ICA: a convolution's masked maps are mixtures of images and channels, the same at every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempo.audit import lab
from tempo.audit.attack import Attack, Control, Effort, Evidence, Figure, NotApplicable, Outcome, Panel
from tempo.audit.controls.toys import dead_leaves
from tempo.audit.controls.weak import Uncovered
from tempo.audit.images import correlations, fitted, png, stretched
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers.unmixing import fast_ica
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth

SOURCES: dict[Effort, int] = {"quick": 192, "full": 1024}
STARTS = 3
"""Of FastICA; the sparsest components are taken."""

PIXELS = 256
"""Of the smallest maps that are looked at: small ones are alike by chance."""
CALLS: dict[Effort, int] = {"quick": 2, "full": 16}


@dataclass(frozen=True)
class Unmixed:
    """Maps that ICA made of one call's, or that call's own: k×H×W."""

    call: Call
    maps: Tensor
    way: str


class SpatialICA(Attack):
    """Separates images (and channels) of a batch by the statistics of their edges."""

    name = "spatial-ica"
    tries = (
        "Takes the maps of a masked convolution input for mixtures of the batch's images and channels, the same at "
        "every pixel, separates them by independent component analysis of differences between neighbouring pixels, "
        "and looks at the pictures."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Unmixed]:
        """From the convolutions with the fewest maps for their pixels; where there are too many, maps as they are."""
        calls = [view.of(layer)[0] for layer in view.layers]
        calls = [call for call in calls if call.x.dim() == 4 and call.x[0, 0].numel() >= PIXELS]
        if not calls:
            raise NotApplicable(f"no convolution of maps of {PIXELS} pixels or more")
        calls = sorted(calls, key=lambda call: maps_of(call) / call.x[0, 0].numel())[: CALLS[effort]]
        few = [call for call in calls if maps_of(call) <= min(SOURCES[effort], call.x[0, 0].numel() - 1)]
        found = [Unmixed(call, unmix(call.x), "unmixed") for call in few]
        return found + [Unmixed(call, call.x.double().flatten(0, 1), "as the worker gets them") for call in calls]

    def score(self, recovered: list[Unmixed], view: View, truth: Truth) -> Outcome:
        """Share of images of which one channel is recovered."""
        shares = dict.fromkeys(("unmixed", "as the worker gets them"), 0.0)
        best, panels = -1.0, []
        for unmixed in recovered:
            plain = truth.of(unmixed.call)["x"].double()
            share, match = recognised(plain, unmixed.maps)
            share -= recognised(plain.flip(-1), unmixed.maps)[0]
            shares[unmixed.way] = max(shares[unmixed.way], share)
            if share > best:
                best = share
                panels = [_panel(plain, unmixed, match, truth.name(unmixed.call.layer))]
        meaning = (
            "share of a batch's inputs of which a channel is seen with |correlation| > 0.9, less the same share of "
            "their mirror images"
        )
        return Outcome(
            figures=[
                Figure(
                    name="images recovered",
                    value=max(shares.values()),
                    leaks=0.2,
                    chance=0.0,
                    ceiling=1.0,
                    meaning=meaning,
                ),
                Figure(
                    name="images recognisable without unmixing",
                    value=shares["as the worker gets them"],
                    leaks=0.2,
                    chance=0.0,
                    ceiling=1.0,
                    meaning="the same of the maps as the worker gets them",
                ),
            ],
            panels=panels,
        )

    def control(self) -> Control:
        """Sixteen raw images, all mixed with all."""
        recorded = raw_images(16, 40)
        evidence = Evidence(recorded.views[0], Knowledge(), recorded.truth())
        return Control(evidence, "images recovered", 1.0, "red-team: batch 16, dense mixing: all")


def spatial(view: View, most: int) -> list[Call]:
    """Calls whose maps are fewer than their pixels and at most ``most``; one for each product, clearest first.

    Raises:
        NotApplicable: There is none.
    """
    found = [view.of(layer)[0] for layer in view.layers]
    found = [
        call for call in found if call.x.dim() >= 4 and maps_of(call) < call.x[0, 0].numel() and maps_of(call) <= most
    ]
    if not found:
        raise NotApplicable(
            f"no convolution with fewer maps (batch × channels) than pixels, and at most {most}: its maps would span "
            "every picture, or are too many for this effort"
        )
    return sorted(found, key=lambda call: maps_of(call) / call.x[0, 0].numel())


def unmix(x: Tensor) -> Tensor:
    """Independent components of N×C×H×W maps, as k×H×W maps.

    FastICA of differences between neighbours: edges are sparse, and what is smooth is alike in all pictures. It may end
    in a local optimum, with two pictures mixed half and half (one start in eighty), so the sparsest of some is taken.
    """
    maps = x.double().flatten(0, 1)
    down, across = maps.diff(dim=-2).flatten(1), maps.diff(dim=-1).flatten(1)
    edges = torch.cat([down, across], 1).T
    matrix = min((fast_ica(edges, seed=seed) for seed in range(STARTS)), key=lambda found: _density(edges @ found))
    return torch.einsum("sk,shw->khw", matrix, maps)


def _density(components: Tensor) -> float:
    """What FastICA makes small: the mean of ``log cosh`` of components of variance 1, lower where they are sparser."""
    standard = components / components.square().mean(0).sqrt()
    return float((F.softplus(2 * standard) - standard).mean())  # log cosh + log 2, without overflow


def recognised(plain: Tensor, maps: Tensor) -> tuple[float, Tensor]:
    """Share of N images of which one channel has |correlation| > 0.9 with a map; and the best map of each channel.

    What all have in common, the mean over the batch, is taken out of both: it is no picture of anything.
    """
    images, channels = plain.shape[:2]
    common = F.normalize(plain.mean((0, 1)).flatten(), dim=0)
    distinct = [t - torch.outer(t @ common, common) for t in (plain.flatten(2).flatten(0, 1), maps.flatten(1))]
    found = correlations(*distinct)
    best = found.abs().amax(1).view(images, channels).amax(1)
    return float((best > 0.9).double().mean()), found.abs().argmax(1).view(images, channels)


def raw_images(count: int, size: int) -> lab.Lab:
    """A session that convolved ``count`` grey pictures, each mixed with all others."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Conv2d(1, 1, 3).double()
    with lab.open_lab(masks=Uncovered(1, count)) as opened:
        opened.session.protect(model, base="secret")
        model(dead_leaves(count, 1, size, generator).double() - 0.5)
    return opened


def _panel(plain: Tensor, unmixed: Unmixed, match: Tensor, name: str) -> Panel:
    chosen = range(min(8, len(plain)))
    originals = stretched(plain[list(chosen)].mean(1, keepdim=True))
    channels = stretched(plain[list(chosen), :1])
    likest = fitted(torch.stack([unmixed.maps[match[i, 0]] for i in chosen]).unsqueeze(1), channels)
    worker = stretched(unmixed.call.x[list(chosen), :1])
    rows = {"original, mean of channels": originals, "first channel": channels}
    rows |= {"a map as the worker gets it": worker, f"the likest map, {unmixed.way}": likest}
    return Panel(
        title=f"Maps of {name}",
        rows={label: [png(image) for image in images] for label, images in rows.items()},
        note="The likest map is chosen by truth, and shown in the original's contrast.",
    )


def maps_of(call: Call) -> int:
    """Batch × channels."""
    return call.x.shape[0] * call.x.shape[1]

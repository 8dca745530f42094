"""Input reconstruction: the pictures that a worker can form from the first products it gets, beside the originals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tempo.audit import lab
from tempo.audit.attack import Attack, Control, Effort, Evidence, Figure, NotApplicable, Outcome, Panel
from tempo.audit.attacks.data_alignment import align
from tempo.audit.attacks.spatial_ica import SOURCES, raw_images, unmix
from tempo.audit.controls.toys import dead_leaves
from tempo.audit.images import correlations, fitted, png, psnr, ssim, stretched
from tempo.audit.knowledge import Knowledge
from tempo.audit.samples import Samples
from tempo.audit.solvers.reference import SAMPLES, plain_inputs
from tempo.audit.solvers.unmixing import flat
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth

PRODUCTS = 3
"""How many of the first products are looked at."""

ORIGINALS = 64
"""Pictures of a batch that are scored, at the most."""

Reader = Callable[[Tensor], Tensor]
"""Makes grey pictures (N×H×W) of a plain operand."""


@dataclass(frozen=True)
class Pictures:
    """What one way of looking at one call gave.

    Attributes:
        call: Which call.
        way: How.
        made: Grey pictures, k×H×W, in no order.
        read: Makes pictures of the plain operand, to compare with.
        gallery: The attacker's own pictures, seen in the same way.
    """

    call: Call
    way: str
    made: Tensor
    read: Reader
    gallery: Tensor


class Reconstruction(Attack):
    """Looks at operands directly, unmixes maps, aligns features with known data, and reads features linearly."""

    name = "reconstruction"
    knows = frozenset({"architecture", "data"})
    tries = (
        "Forms pictures from what the first products are sent: as it is, unmixed by spatial independent component "
        "analysis, with features aligned to the covariance of known data, and by a linear reader trained on the "
        "attacker's own data; then looks the pictures up in a gallery."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> list[Pictures]:
        """All pictures from the last calls of the first products."""
        assert knowledge.data is not None  # noqa: S101 - declared in `knows`
        images = knowledge.data.inputs[:SAMPLES]
        if images.dim() != 4:
            raise NotApplicable("inputs are not pictures")
        own = _grey(images)
        try:
            known = plain_inputs(view, knowledge)
        except NotApplicable:
            known = {}
        found = []
        # Layers that share an input travel alone at first: what is known is of the products that they join in later.
        for layer in dict.fromkeys([*view.layers[:PRODUCTS], *list(known)[:PRODUCTS]]):
            call = view.of(layer)[-1]
            found += look(call, images.shape[1:], own, SOURCES[effort])
            if layer in known:
                found += read(call, known[layer], own)
        if not found:
            raise NotApplicable("the first products are not sent pictures, nor anything known to be read as such")
        return found

    def score(self, recovered: list[Pictures], view: View, truth: Truth) -> Outcome:
        """By the way that finds most pictures of the batch again."""
        scored = [(_score(pictures, truth), pictures) for pictures in recovered]
        best, pictures = max(scored, key=lambda pair: (pair[0].found - pair[0].mistaken, pair[0].ssim))
        name = truth.name(pictures.call.layer)
        figures = [
            Figure(
                name="pictures found again",
                value=best.found - best.mistaken,
                leaks=min(0.95, max(0.3, 3 * (0.5 / len(best.originals)) ** 0.5)),  # three standard errors at least
                chance=0.0,
                ceiling=1.0,
                meaning="share of a batch's pictures whose likeness leads to the original in a gallery of the "
                "attacker's and the victim's pictures, less the same share for pictures that were not in the batch",
            ),
            Figure(
                name="SSIM",
                value=best.ssim,
                chance=best.chance_ssim,
                ceiling=1.0,
                meaning=f"structural similarity of the best pictures ({pictures.way}, {name}); chance: as many "
                "pictures of the attacker's own",
            ),
            Figure(
                name="PSNR",
                value=best.psnr,
                chance=best.chance_psnr,
                ceiling=100.0,
                meaning="peak signal-to-noise ratio of the same, in decibels",
            ),
        ]
        return Outcome(figures=figures, panels=[_panel(pictures, best, name)])

    def control(self) -> Control:
        """Sixteen raw images, all mixed with all."""
        recorded = raw_images(16, 40)
        others = dead_leaves(64, 1, 40, torch.Generator().manual_seed(1)) - 0.5
        knowledge = Knowledge(
            architecture=lambda: nn.Conv2d(1, 1, 3), data=Samples(others, torch.zeros(64, dtype=torch.int64))
        )
        evidence = Evidence(recorded.views[0], knowledge, recorded.truth())
        return Control(evidence, "pictures found again", 0.9, "red-team: raw images of a batch of 16: all recovered")


class ReconstructionBase(Reconstruction):
    """The same with the public checkpoint: deeper features can be read."""

    name = "reconstruction-base"
    knows = frozenset({"architecture", "data", "base"})

    def control(self) -> Control:
        """Features behind a public first layer, in plain."""
        torch.manual_seed(0)
        model = _features()
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        pictures = dead_leaves(SAMPLES + 32, 1, 12, torch.Generator().manual_seed(1)) - 0.5
        with lab.open_lab(scheme="insecure-plain") as opened:
            opened.session.protect(model, base="secret", trusted=("1",))
            model(pictures[SAMPLES:])
        own = Samples(pictures[:SAMPLES], torch.zeros(SAMPLES, dtype=torch.int64))
        evidence = Evidence(opened.views[0], Knowledge(_features, base, own, ("1",)), opened.truth())
        return Control(evidence, "pictures found again", 0.8, "insecure-plain: features are read by a linear map")


def _features() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 192), nn.GELU(), nn.Linear(192, 32))


def look(call: Call, shape: torch.Size, own: Tensor, sources: int) -> list[Pictures]:
    """At operands that are pictures: maps of the pictures' size, or rows with a feature for each of their values."""
    x = call.x.double()
    if x.dim() == 4 and x.shape[2:] == shape[1:]:
        found = [Pictures(call, "as it is", x.flatten(0, 1), _grey, own)]
        if len(x) * x.shape[1] <= min(sources, x[0, 0].numel() - 1):
            found.append(Pictures(call, "spatial unmixing", unmix(x), _grey, own))
        return found
    if x.dim() == 2 and x.shape[1] == shape.numel():
        return [Pictures(call, "as it is", _grey(x.view(-1, *shape)), lambda t: _grey(t.view(-1, *shape)), own)]
    return []


def read(call: Call, known: Tensor, own: Tensor) -> list[Pictures]:
    """Features by linear regression, fitted on the attacker's pictures: as they are, and aligned with known data.

    Half of the pictures are kept back, for a gallery of pictures that the regression was not fitted on.
    """
    count = len(known) // len(own) if known.dim() == 2 else 1
    if known.dim() == 2 and (len(known) % len(own) or len(call.x) < count):
        return []

    def per_picture(x: Tensor) -> Tensor:
        """One line of features for each picture, whose tokens are rows one after another."""
        return x.double().flatten(1)[: len(x) // count * count].reshape(len(x) // count, -1)

    features, fitting = per_picture(known), len(own) // 2
    mean, targets = features[:fitting].mean(0), own[:fitting].flatten(1)
    centred = features[:fitting] - mean
    kernel = centred @ centred.T
    kernel += 1e-3 * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=torch.float64)
    weights = centred.T @ torch.linalg.solve(kernel, targets - targets.mean(0))

    def reader(x: Tensor) -> Tensor:
        pictures: Tensor = (per_picture(x) - mean) @ weights + targets.mean(0)
        return pictures.view(-1, *own.shape[1:])

    gallery = reader(known)[fitting:]
    found = [Pictures(call, "linear reader", reader(call.x), reader, gallery)]
    masked = flat(call.x)
    if call.x.dim() == 2 and len(masked) >= 4 * masked.shape[1]:
        undone = masked @ align(masked, flat(known))
        found.append(Pictures(call, "aligned with known data, linear reader", reader(undone), reader, gallery))
    return found


@dataclass(frozen=True)
class _Scored:
    originals: Tensor
    chosen: Tensor
    found: float
    mistaken: float
    ssim: float
    psnr: float
    chance_ssim: float
    chance_psnr: float


def _score(pictures: Pictures, truth: Truth) -> _Scored:
    originals = stretched(pictures.read(truth.of(pictures.call)["x"].double())[:ORIGINALS])
    gallery = stretched(pictures.gallery)
    half = min(len(originals), len(gallery) // 2)
    decoys, others = gallery[:half], gallery[half:]
    chosen = _nearest(originals, pictures.made)
    guesses = _nearest(originals, others[: len(pictures.made)])
    return _Scored(
        originals,
        chosen,
        _found(originals, pictures.made, torch.cat([originals, gallery])),
        _found(decoys, pictures.made, torch.cat([gallery, originals])),
        float(ssim(chosen[:, None], originals[:, None]).mean()),
        float(psnr(chosen[:, None], originals[:, None]).mean()),
        float(ssim(guesses[:, None], originals[:, None]).mean()),
        float(psnr(guesses[:, None], originals[:, None]).mean()),
    )


def _nearest(originals: Tensor, made: Tensor) -> Tensor:
    """For each original the picture that correlates best, in its contrast."""
    return fitted(made[correlations(originals, made).abs().argmax(1)], originals)


def _found(wanted: Tensor, made: Tensor, gallery: Tensor) -> float:
    """Share of ``wanted`` (the first of ``gallery``) that their likest picture leads back to."""
    likest = made[correlations(wanted, made).abs().argmax(1)]
    back = correlations(likest, gallery).abs().argmax(1)
    return float((back == torch.arange(len(wanted))).double().mean())


def _panel(pictures: Pictures, scored: _Scored, name: str) -> Panel:
    shown = [png(image[None]) for image in scored.originals[:8]], [png(image[None]) for image in scored.chosen[:8]]
    raw = stretched(pictures.made[:8])
    return Panel(
        title=f"Pictures from {name}: {pictures.way}",
        rows={
            "original" if "reader" not in pictures.way else "read from the plain operand": shown[0],
            "what the worker can form, the first ones": [png(image[None]) for image in raw],
            "the likest of all, in the original's contrast": shown[1],
        },
        note="The attacker cannot tell which of its pictures is like which original: the last row is chosen by truth.",
    )


def _grey(images: Tensor) -> Tensor:
    return images.double().mean(1)

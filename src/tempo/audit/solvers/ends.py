"""Where a stolen network begins and ends: which masked input is which pixel, which masked output which class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempo.audit.samples import Samples
from tempo.audit.solvers.matching import assign
from tempo.audit.solvers.placed import Placed
from tempo.audit.theft import predictions
from tempo.recipes.models import logits

ATOM = 0.02
"""Share of samples that must have a feature's least value, for it to give the feature's scale (a background, say)."""


FAINT = 1e-2
"""Size of a gradient's row, beside the largest, below which it counts less."""


def align_inputs(placed: Placed, samples: Samples, last: Placed) -> None:
    """Find which masked input feature is which, and its scale, by the attacker's own samples.

    By what scales do not change: the values' distribution, correlations with all others, and means by class, since
    signs of the last gradient tell which samples have one label. Changes ``placed``.
    """
    x = placed.raw_x()
    x = x / placed.log_v.exp().view(-1, *[1] * (x.dim() - 1))
    own = samples.inputs.double()
    own = own.flatten(1) if x.dim() == 2 else own
    if x.shape[1] > 1:
        placed.inputs = placed.inputs[_same_features(own, x, samples.labels, labels_by_gradient(last))]
        x = placed.raw_x()
        x = x / placed.log_v.exp().view(-1, *[1] * (x.dim() - 1))
    placed.log_kappa = _scales(x).log() - _scales(own).log()
    # A common unit: of all scales, those by atoms are exact.
    both = _atoms(x) & _atoms(own)
    if bool(both.any()):
        least = (x.movedim(1, 0).flatten(1).amin(1) / own.movedim(1, 0).flatten(1).amin(1))[both]
        placed.log_kappa[both] = least.log()


def labels_by_gradient(last: Placed) -> Tensor | None:
    """The class of each sample, in masked order: the one negative entry of its logits' gradient; −1 where it is 0."""
    g = last.g()
    if g is None or g.dim() != 2 or bool(((g < 0).sum(1) > 1).any()):
        return None
    return torch.where((g < 0).any(1), g.argmin(1), -1)


def _features(x: Tensor, labels: Tensor | None, classes: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each feature: its distribution, its correlations, its means by class; nothing depends on its scale."""
    flat = x.movedim(1, 0).flatten(1)
    flat = flat / flat.square().mean(1, keepdim=True).sqrt().clamp_min(1e-300)
    levels = torch.linspace(0, 1, 21, dtype=torch.float64)
    shape = torch.quantile(flat, levels, dim=1).T
    if x.dim() > 2:
        mean = x.mean(0).flatten(1)
        shape = torch.cat([shape, mean / x.square().mean((0, 2, 3)).sqrt()[:, None]], 1)
    correlations = torch.corrcoef(flat + 0).nan_to_num()
    means = None
    if labels is not None and x.dim() == 2:
        means = torch.stack([flat[:, labels == c].mean(1).nan_to_num() for c in range(classes)], 1)
    return shape, correlations, means


def _same_features(own: Tensor, x: Tensor, own_labels: Tensor, labels: Tensor | None) -> Tensor:
    """For each of the attacker's features, the masked one that is the same."""
    classes = int(own_labels.max()) + 1
    shape, correlations, means = _features(own, own_labels, classes)
    shape2, correlations2, means2 = _features(x, labels, classes)
    rows = torch.arange(len(shape))

    def distances(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b).square() / a.shape[1]

    start = distances(shape, shape2) + distances(correlations.sort(1).values, correlations2.sort(1).values)
    if means is not None and means2 is not None:
        start = start + distances(means.sort(1).values, means2.sort(1).values)
    found = assign(-start)
    for _ in range(30):
        cost = distances(correlations, correlations2[:, found]) + 0.5 * distances(shape, shape2)
        if means is not None and means2 is not None:
            order = assign(-torch.cdist(means.T, means2[found].T))
            cost = cost + 2 * distances(means, means2[:, order])
        new = assign(-cost)
        if torch.equal(new, found):
            break
        found = new
    return found[rows]


def _scales(x: Tensor) -> Tensor:
    size = x.movedim(1, 0).flatten(1).square().mean(1).sqrt()
    return torch.where(size > 0, size, 1.0)


def _atoms(x: Tensor) -> Tensor:
    """Features whose least value is negative and taken again and again."""
    flat = x.movedim(1, 0).flatten(1)
    least = flat.amin(1, keepdim=True)
    return (least[:, 0] < 0) & ((flat - least).abs() <= 1e-4 * least.abs()).double().mean(1).ge(ATOM)


def align_outputs(placed: Placed, module: Any) -> bool:
    """Scales and bias of logits, from their gradient: softmax minus one-hot; classes stay in masked order.

    Rows of ``softmax − onehot`` sum to zero, which gives the scales of classes; logarithms of ratios within a row are
    differences of logits, which gives the rest. Changes ``placed`` and ``module``'s bias.

    Returns:
        Whether the gradient is of this kind at all.
    """
    g = placed.call.g
    labels = labels_by_gradient(placed)
    if (
        g is None
        or labels is None
        or module.bias is None
        or g.shape[1] < 3
        or int((labels >= 0).sum()) < 2 * g.shape[1]
    ):
        return False
    told = labels >= 0
    g = (g.double()[placed.rows] * placed.log_v.exp()[:, None])[told]
    labels = labels[told]
    # In rows that are nearly zero, rounding of softmax − 1 is large: they count less.
    size = g.norm(dim=1, keepdim=True)
    g = g / size.clamp_min(FAINT * float(size.max()))
    sizes = g.norm(dim=0).clamp_min(1e-300)
    _, values, right = torch.linalg.svd(g / sizes, full_matrices=False)
    null = right[-1] * right[-1].sum().sign()
    if float(values[-1]) > 1e-3 * float(values[-2]) or bool((null <= 0).any()):
        return False
    p = null / sizes
    y = (placed.raw_y() / (placed.log_v.exp()[:, None] * p))[told]
    logs = (g * p).clamp_min(1e-300).log()
    usable = (torch.arange(g.shape[1]) != labels[:, None]) & (g > 0) & (logs > logs.amax(1, keepdim=True) - 20)
    # log g = τ y + b + (row), by least squares without the rows' means.
    design = torch.cat([y[:, :, None], torch.eye(g.shape[1]).double().expand(len(y), -1, -1)], 2)
    weight = usable.double()[:, :, None]
    centre = weight.sum(1, keepdim=True).clamp_min(1)
    design = weight * (design - (weight * design).sum(1, keepdim=True) / centre)
    target = weight * (logs[:, :, None] - (weight * logs[:, :, None]).sum(1, keepdim=True) / centre)
    solved = torch.linalg.lstsq(design.flatten(0, 1), target.flatten(0, 1), driver="gelsd").solution[:, 0]
    if not float(solved[0]) > 0:
        return False
    placed.log_p = p.log() - solved[0].log()
    module.bias.data.copy_(solved[1:])
    return True


def name_classes(model: nn.Module, module: Any, samples: Samples) -> None:
    """Put the outputs of the last layer in the order of the classes, by labelled samples."""
    with torch.no_grad():
        scores = torch.cat([F.log_softmax(logits(model, part), 1) for part in samples.inputs.split(256)])
    guessed = predictions(model, samples.inputs)
    classes = scores.shape[1]
    counts = torch.zeros(classes, classes)
    counts.index_put_((samples.labels, guessed), torch.ones(len(guessed)), accumulate=True)
    order = assign(counts.double() + 1e-6 * torch.eye(classes).double())
    module.weight.data.copy_(module.weight.data[order])
    module.bias.data.copy_(module.bias.data[order])

"""Pictures in an audit: how alike two are, and how they get into a report."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor
from torch.nn import functional as F


def psnr(image: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels of each of N×C×H×W images in 0..1; 100 at the most."""
    error = (image - original).double().square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()


def ssim(image: Tensor, original: Tensor) -> Tensor:
    """Structural similarity of each of N×C×H×W images in 0..1.

    Wang, Bovik, Sheikh and Simoncelli (2004), with a uniform window of 7 pixels, or as many as there are.
    """
    x, y = image.double(), original.double()
    window = min(7, *x.shape[-2:])

    def local(t: Tensor) -> Tensor:
        return F.avg_pool2d(t, window, stride=1)

    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    cov = local(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.flatten(1).mean(1)


def correlations(images: Tensor, others: Tensor) -> Tensor:
    """Pearson correlation of every image with every other: N×M, of N×… and M×… of the same size."""
    a, b = (F.normalize(t.double().flatten(1) - t.double().flatten(1).mean(1, keepdim=True)) for t in (images, others))
    return a @ b.T


def fitted(image: Tensor, like: Tensor) -> Tensor:
    """Images in the sign, contrast and brightness under which each comes nearest to ``like``, clipped to 0..1.

    What an attacker would do by eye.
    """
    x, y = image.double().flatten(1), like.double().flatten(1)
    x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    centred = x - x_mean
    slope = (centred * (y - y_mean)).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True).clamp_min(1e-12)
    return (slope * centred + y_mean).clamp(0, 1).view(image.shape).float()


def stretched(images: Tensor) -> Tensor:
    """Each image's values brought to 0..1, without knowledge of what it should look like."""
    flat = images.double().flatten(1)
    least, most = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return ((flat - least) / (most - least).clamp_min(1e-12)).view(images.shape).float()


def png(image: Tensor) -> str:
    """A C×H×W image in 0..1, of one or three channels, as base64 PNG; other channel counts are averaged."""
    from PIL import Image

    if image.shape[0] not in (1, 3):
        image = image.mean(0, keepdim=True)
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).squeeze(-1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()

"""Small networks and data for controls, curves and tests: what attacks need to find, in miniature."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ClassTokenNet(nn.Module):
    """A pre-norm transformer on token sequences (N×T×d) that classifies by its class token, as a ViT does.

    Args:
        width: Features of a token.
        depth: Number of blocks.
        classes: Of the output.
    """

    def __init__(self, width: int = 64, depth: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores, N×classes."""
        x = torch.cat([self.token.expand(len(tokens), 1, -1), tokens], 1)
        for number, (qkv, out, up, down) in enumerate(zip(self.qkv, self.out, self.up, self.down, strict=True)):
            query, key, value = qkv(self.norms[2 * number](x)).chunk(3, -1)
            x = x + out(F.scaled_dot_product_attention(query, key, value))
            x = x + down(F.gelu(up(self.norms[2 * number + 1](x))))
        scores: Tensor = self.head(self.norm(x[:, 0]))
        return scores


def dead_leaves(count: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    """Pictures with the edges and occlusions of natural images: discs of power-law radii, one over another.

    Lee, Mumford and Huang, "Occlusion models for natural images" (2001).

    Returns:
        count × channels × size × size, in 0..1.
    """
    grid = torch.arange(size, dtype=torch.float32)
    images = torch.rand(count, channels, 1, 1, generator=generator).expand(-1, -1, size, size).clone()
    for _ in range(60):
        # Uniform 1/r² between two bounds gives radii of density r^-3: the same at every scale.
        least, most = 1 / 1.5**2, 1 / (size / 2) ** 2
        radius = (most + (least - most) * torch.rand(count, generator=generator)).rsqrt()
        row, column = size * torch.rand(2, count, generator=generator)
        inside = (grid.view(1, -1, 1) - row.view(-1, 1, 1)) ** 2 + (grid.view(1, 1, -1) - column.view(-1, 1, 1)) ** 2
        colour = torch.rand(count, channels, 1, 1, generator=generator)
        images = torch.where((inside < radius.view(-1, 1, 1) ** 2).unsqueeze(1), colour, images)
    return images


def sparse_features(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Independent non-negative features, mostly near zero, of unit mean: as after ReLU, but without common causes."""
    uniform = torch.rand(rows, width, generator=generator, dtype=torch.float64)
    return (-(uniform.clamp_min(1e-12).log())) ** 1.5 / 1.3293404


def correlated_features(rows: int, width: int, generator: torch.Generator, dependence: int = 4) -> Tensor:
    """Gaussian-like features of a common low-dimensional cause, as hidden layers have: no one stands out."""
    mixing = torch.randn(dependence * width, width, generator=generator, dtype=torch.float64)
    decay = torch.arange(1, dependence * width + 1, dtype=torch.float64) ** -0.5
    causes = torch.randn(rows, dependence * width, generator=generator, dtype=torch.float64)
    features: Tensor = (causes * decay) @ mixing / decay.norm()
    return features

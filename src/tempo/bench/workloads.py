"""What can be benchmarked. A new workload is a function of the batch's size, and a registry line."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tempo.bench.lora import LORA
from tempo.bench.workload import Workload


def _vision(model: nn.Module, description: str, size: int, batch: int, trusted: tuple[str, ...]) -> Workload:
    images = torch.randn(batch, 3, size, size)
    labels = torch.randint(0, 10, (batch,))
    return Workload(description, model, lambda m: m(pixel_values=images, labels=labels).loss, batch, trusted)


def _vit(description: str, width: int, depth: int, heads: int, mlp: int, size: int, batch: int) -> Workload:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=size,
        patch_size=4,
        num_labels=10,
    )
    return _vision(ViTForImageClassification(config), description, size, batch, ("*patch_embeddings.projection",))


def vit_b(batch: int = 64) -> Workload:
    """The paper's ViT."""
    return _vit(f"ViT-B/4 on 32×32, batch {batch}", 768, 12, 12, 3072, 32, batch)


def vit_small(batch: int = 64) -> Workload:
    """A small one, for a first look."""
    return _vit(f"ViT width 256, depth 4, on 32×32 in patches of 4, batch {batch}", 256, 4, 4, 1024, 32, batch)


def resnet50(batch: int = 32) -> Workload:
    """The paper's ResNet; at 128×128 its first stage has 32×32 maps."""
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig(num_labels=10))
    return _vision(model, f"ResNet-50 on 128×128, batch {batch}", 128, batch, ("resnet.embedder.embedder.convolution",))


def block_2048(batch: int = 32) -> Workload:
    """One transformer block of a language model's size."""
    block = nn.TransformerEncoderLayer(
        2048, 16, 8192, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    tokens = torch.randn(batch, 256, 2048, requires_grad=True)
    description = f"transformer block, width 2048, 16 heads, {batch} sequences of 256"
    return Workload(description, block, lambda m: m(tokens).square().mean(), batch)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "vit-small": vit_small,
    "vit-b": vit_b,
    "resnet50": resnet50,
    "block-2048": block_2048,
    **LORA,
}

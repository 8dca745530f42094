"""The models a recipe can name. A new one is a class with a ``build`` method and a line in `Model`.

All start from seeded random weights: nothing is downloaded.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta
from torch import Tensor, nn

from tempo.errors import SettingsError
from tempo.recipes.table import Table

Count = Annotated[int, Meta(ge=1, le=1 << 16)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]


class _Architecture(Table, frozen=True, tag_field="name"):
    """What a ``[model]`` table describes."""

    def build(self, channels: int, size: int, classes: int) -> nn.Module:
        """A network for square images of ``size`` pixels; seed torch before, for the same weights again."""
        raise NotImplementedError


class VitSmall(_Architecture, frozen=True, tag="vit-small"):
    """A small `ViTForImageClassification`, for images of a few pixels."""

    width: Count = 128
    depth: Count = 4
    heads: Count = 4
    mlp: Count = 256
    patch: Count = 2
    dropout: Fraction = 0.0
    init: Annotated[float, Meta(gt=0)] = 0.05
    """Standard deviation of the initial weights; narrow networks want more than ViT's usual 0.02."""

    def build(self, channels: int, size: int, classes: int) -> nn.Module:
        """The network."""
        from transformers import ViTConfig, ViTForImageClassification

        if size % self.patch:
            raise SettingsError(f"[model]: patch {self.patch} does not divide the image size {size}")
        if self.width % self.heads:
            raise SettingsError(f"[model]: heads {self.heads} does not divide width {self.width}")
        config = ViTConfig(
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            intermediate_size=self.mlp,
            hidden_dropout_prob=self.dropout,
            initializer_range=self.init,
            image_size=size,
            patch_size=self.patch,
            num_channels=channels,
            num_labels=classes,
        )
        model: nn.Module = ViTForImageClassification(config)
        return model


class VitB(VitSmall, frozen=True, tag="vit-b"):
    """ViT-B, with patches of four pixels for CIFAR's images: the paper's second network."""

    width: Count = 768
    depth: Count = 12
    heads: Count = 12
    mlp: Count = 3072
    patch: Count = 4
    init: Annotated[float, Meta(gt=0)] = 0.02


class ResNet50(_Architecture, frozen=True, tag="resnet50"):
    """ResNet-50 as `ResNetForImageClassification` defines it: the paper's first network."""

    def build(self, channels: int, size: int, classes: int) -> nn.Module:
        """The network."""
        return _resnet(channels, classes)


class ResNetSmall(_Architecture, frozen=True, tag="resnet-small"):
    """A residual network of a few basic blocks; each entry of ``depths`` halves the image but the first."""

    width: Count = 32
    depths: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=6)] = (1, 1, 1)

    def build(self, channels: int, size: int, classes: int) -> nn.Module:
        """The network."""
        widths = [self.width << stage for stage in range(len(self.depths))]
        return _resnet(
            channels,
            classes,
            embedding_size=self.width,
            hidden_sizes=widths,
            depths=list(self.depths),
            layer_type="basic",
        )


class Mlp(_Architecture, frozen=True, tag="mlp"):
    """Fully connected layers with ReLU between them."""

    width: Count = 128
    depth: Count = 2
    dropout: Fraction = 0.0

    def build(self, channels: int, size: int, classes: int) -> nn.Module:
        """The network."""
        layers: list[nn.Module] = [nn.Flatten()]
        features = channels * size * size
        for _ in range(self.depth):
            layers += [nn.Linear(features, self.width), nn.ReLU(), nn.Dropout(self.dropout)]
            features = self.width
        return nn.Sequential(*layers, nn.Linear(features, classes))


Model = VitSmall | VitB | ResNet50 | ResNetSmall | Mlp


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The scores of ``images``, from a transformers model or a plain one."""
    output = model(images)
    scores: Tensor = getattr(output, "logits", output)
    return scores


def _resnet(channels: int, classes: int, **sizes: object) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    model: nn.Module = ResNetForImageClassification(ResNetConfig(num_channels=channels, num_labels=classes, **sizes))
    return model

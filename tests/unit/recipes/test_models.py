from __future__ import annotations

import pytest
import torch

from tempo.errors import SettingsError
from tempo.recipes.models import Mlp, Model, ResNet50, ResNetSmall, VitB, VitSmall, logits

SMALL: list[Model] = [
    VitSmall(width=16, depth=1, heads=2, mlp=16),
    VitB(width=24, depth=1, heads=2, mlp=16),
    ResNetSmall(width=4, depths=(1, 1)),
    Mlp(width=8),
]


@pytest.mark.parametrize("model", SMALL, ids=lambda model: type(model).__name__)
def test_models_score_images_and_depend_on_the_seed_alone(model: Model) -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(3)
        return model.build(channels=3, size=16, classes=7).eval()

    images = torch.randn(2, 3, 16, 16)
    scores = logits(build(), images)
    assert scores.shape == (2, 7)
    assert torch.equal(logits(build(), images), scores)


def test_the_papers_networks_have_their_usual_size() -> None:
    with torch.device("meta"):
        sizes = {
            type(model): sum(p.numel() for p in model.build(3, 32, 10).parameters()) for model in (ResNet50(), VitB())
        }
    assert sizes[ResNet50] == 23_528_522
    assert sizes[VitB] == 85_152_010


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(SettingsError, match="patch 3 does not divide the image size 8"):
        VitSmall(patch=3).build(1, 8, 10)
    with pytest.raises(SettingsError, match="heads 3 does not divide width 128"):
        VitSmall(heads=3).build(1, 8, 10)

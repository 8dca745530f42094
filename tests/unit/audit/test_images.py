"""Figures of how alike pictures are."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from tempo.audit import images


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_equal_pictures_are_alike(pictures):
    assert torch.equal(images.psnr(pictures, pictures), torch.full((3,), 100.0, dtype=torch.float64))
    torch.testing.assert_close(images.ssim(pictures, pictures), torch.ones(3, dtype=torch.float64))


def test_psnr_of_a_known_error(pictures):
    torch.testing.assert_close(
        images.psnr(pictures, pictures + 0.1), torch.full((3,), 20.0, dtype=torch.float64), rtol=1e-4, atol=0
    )


def test_other_pictures_are_not_alike(pictures):
    others = pictures.flip(0)
    assert images.ssim(pictures, others)[0] < 0.2
    assert images.correlations(pictures, others).argmax(1).tolist() == [2, 1, 0]


def test_sign_and_contrast_are_fitted(pictures):
    pictures = 0.25 + pictures / 2
    torch.testing.assert_close(images.fitted(3 - 2 * pictures, pictures), pictures)


def test_stretching_reaches_both_ends(pictures):
    stretched = images.stretched(7 * pictures - 3)
    assert stretched.amin() == 0
    assert stretched.amax() == 1


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (32, "L")])
def test_pictures_go_through_png(channels, mode):
    picture = torch.rand(channels, 5, 4)
    read = Image.open(io.BytesIO(base64.b64decode(images.png(picture))))
    assert (read.mode, read.size) == (mode, (4, 5))
    if channels == 3:
        assert read.getpixel((1, 2)) == tuple((picture[:, 2, 1] * 255).round().int().tolist())

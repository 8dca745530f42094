"""Scheme `insecure-plain`: no masks at all. The control of every experiment; it hides nothing."""

from __future__ import annotations

from typing import Literal

import torch

from tempo.keys import Key
from tempo.schemes.base import Traits
from tempo.schemes.masks import IDENTITY, Mask
from tempo.schemes.single import SingleMaskScheme


class InsecurePlain(SingleMaskScheme):
    """Identity masks."""

    name = "insecure-plain"
    traits = Traits(
        protects="nothing: workers see inputs, weights and gradients in clear",
        lasting_masks=True,
        known_breaks={"always": "nothing is masked; it is for comparisons only"},
    )

    @property
    def commutes(self) -> Literal["with any", "with rotations", "not"]:
        """There is nothing to commute with."""
        return "with any"

    def feature_masks(self, key: Key, inputs: int, outputs: int, groups: int, dtype: torch.dtype) -> tuple[Mask, Mask]:
        """The identity, twice."""
        return IDENTITY, IDENTITY

    def row_mask(self, key: Key, part: int, rows: int, dtype: torch.dtype) -> Mask:
        """The identity."""
        return IDENTITY

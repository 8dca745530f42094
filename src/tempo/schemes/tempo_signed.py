"""Scheme `tempo-signed`: the paper's scheme with signs for the scales of features, so that workers can run optimizers.

Element-wise arithmetic commutes with signed permutations, and with no other masks: what SGD, Adam, AdamW or Lion makes
of a weight under ``A`` and ``P`` is the weight that they make, under ``A`` and ``P`` (design, "Where weights are
updated"). Rows keep the integer scales of the paper, which cancel in the gradient of a weight.
"""

from __future__ import annotations

from typing import Literal

import torch

from tempo.keys import Key
from tempo.schemes.base import Traits
from tempo.schemes.masks import Mask, draw_signs
from tempo.schemes.tempo import Tempo


class TempoSigned(Tempo):
    """Permutation × sign on input and output features, permutation × positive integer scale on rows."""

    name = "tempo-signed"
    traits = Traits(
        protects="permutes what workers see, flips signs of features; magnitudes, or a known base checkpoint, undo it",
        known_breaks={
            "always": "magnitudes stay as they are, up to a scale for each row, and masks of successive steps can be "
            "linked",
            "relu": "this model's activations (ReLU, GELU, SiLU and the like) carry zeros and magnitudes to the next "
            "layer, as under `tempo` (docs/schemes/tempo.md)",
            "public-base": "row and column signatures against the public checkpoint recover permutations and signs",
        },
    )

    @property
    def commutes(self) -> Literal["with any", "with rotations", "not"]:
        """Signed permutations."""
        return "with any"

    def feature_masks(self, key: Key, inputs: int, outputs: int, groups: int, dtype: torch.dtype) -> tuple[Mask, Mask]:
        """Permutations and signs; with groups, channels move within groups and groups among themselves."""
        order = torch.from_numpy(key.stream("groups").permutation(groups)) if groups > 1 else None
        return draw_signs(key.stream("A"), inputs, order), draw_signs(key.stream("P"), outputs, order)

"""Scheme `tempo`: the paper's generalised permutations (Xu & Fang, arXiv 2401.11531, section IV), faithfully.

``KGen(m, n, p)`` draws ``(c_m, π_m, c_n, π_n, c_p, π_p)``: positive integers and permutations. Then
``X'(i,j) = (c_m[i]/c_n[j])·X(π_m(i),π_n(j))``, ``W'(j,k) = (c_n[j]/c_p[k])·W(π_n(j),π_p(k))``, and so
``Y'(i,k) = (c_m[i]/c_p[k])·Y(π_m(i),π_p(k))``. Masking costs O(mn+np+mp), the worker's product O(mnp).
"""

from __future__ import annotations

import warnings
from typing import Self

import torch

from tempo.errors import ProtectionWarning
from tempo.keys import Key
from tempo.schemes.base import Traits
from tempo.schemes.masks import Mask, draw
from tempo.schemes.single import SingleMaskScheme
from tempo.settings import Settings


class Tempo(SingleMaskScheme):
    """Permutation × positive integer scale on rows, input and output features.

    Args:
        max_scale: Largest integer scale ``c``.
    """

    name = "tempo"
    traits = Traits(
        protects="permutes and scales what workers see; sign patterns, or a known base checkpoint, undo it",
        known_breaks={
            "always": "positive scales keep zeros and signs as they are, and masks of successive steps can be linked",
            "relu": "this model's activations (ReLU, GELU, SiLU and the like) carry zeros and signs to the next layer; "
            "matching neighbouring layers recovers the permutations, and so the network, with nothing else known "
            "(docs/schemes/tempo.md)",
            "public-base": "row and column signatures against the public checkpoint recover permutations and scales",
        },
    )

    def __init__(self, max_scale: int = 255) -> None:
        self.max_scale = max_scale

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The paper's scales, with a word about eight bits: they differ by as much within a block."""
        if settings.wire_dtype == "int8" and cls is Tempo:
            warnings.warn(
                "scheme 'tempo' with wire_dtype='int8': scales of features, up to 255, take the bits of numbers, "
                "and products are off by a tenth or more; use scheme 'mix' or 'tempo-signed', or wire_dtype='bfloat16'",
                ProtectionWarning,
                stacklevel=4,
            )
        return cls()

    def feature_masks(self, key: Key, inputs: int, outputs: int, groups: int, dtype: torch.dtype) -> tuple[Mask, Mask]:
        """``(c_n, π_n)`` and ``(c_p, π_p)``; with groups, channels move within groups and groups among themselves."""
        order = torch.from_numpy(key.stream("groups").permutation(groups)) if groups > 1 else None
        return (
            draw(key.stream("A"), inputs, self.max_scale, order),
            draw(key.stream("P"), outputs, self.max_scale, order),
        )

    def row_mask(self, key: Key, part: int, rows: int, dtype: torch.dtype) -> Mask:
        """``(c_m, π_m)``."""
        return draw(key.stream(f"L{part}"), rows, self.max_scale)

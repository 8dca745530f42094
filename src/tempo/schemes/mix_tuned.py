"""Scheme `mix-tuned`: `mix` for models that start from a public base."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

from tempo.schemes.mix import Mix
from tempo.settings import Settings


class MixTuned(Mix):
    """`mix` in two rounds."""

    name = "mix-tuned"
    traits = replace(Mix.traits, public_base_preset="", known_breaks={}, mask_seconds_per_element=14e-9)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """With the blocks that the settings ask for."""
        return cls(
            settings.mix_block,
            settings.mix_row_block,
            2,
            settings.mix_condition,
            insecure_small_blocks=settings.insecure_small_blocks,
        )

"""Scheme `mix`: secret structured mixing of rows, input features and output features.

Every mask is permutation × block-diagonal matrix × permutation, once or twice over (``rounds``). Blocks are dense and
secret, Haar-distributed orthogonal or general with a bounded condition number. So masking stays O(elements), and what
a worker sees are sums over a whole block of rows and a whole block of features: no zero, sign or row survives.

Not solved here: a row of ``G`` that is exactly zero (class-token pooling, masked labels) stays out of the sums of its
block, and a block with one live row shows its column of ``L``. See ``docs/schemes/mix.md``.
"""

from __future__ import annotations

from typing import Self

import torch

from tempo.errors import UnsafeError
from tempo.keys import Key
from tempo.schemes.base import Traits
from tempo.schemes.masks import Mask, draw_blocks
from tempo.schemes.single import SingleMaskScheme
from tempo.settings import Settings
from tempo.wire.messages import Conv, Product

LEAST_BLOCK = 8
"""Smaller blocks of features fall to sparse-direction searches and to frames of a known base."""

LEAST_ROW_BLOCK = 16
"""Smaller blocks of rows fall to pair tests, with no prior knowledge at all."""


class Mix(SingleMaskScheme):
    """Blocks between permutations on rows (batch), input and output features (channels).

    Args:
        block: Least number of features mixed by one block.
        row_block: Least number of rows mixed by one block; shield rows fill up where there are fewer.
        rounds: How often each axis is mixed.
        condition: Bound on the condition number of a block; 1 for orthogonal ones.
        insecure_small_blocks: Allow blocks that are known to be too small.

    Raises:
        UnsafeError: A block is too small.
    """

    name = "mix"
    traits = Traits(
        protects="resists workers without the base checkpoint: before this code was written, blind attacks that "
        "worked at row blocks of 4 failed at 32; not audited yet, see docs/schemes/mix.md",
        mask_seconds_per_element=7e-9,
        public_base_preset="mix-tuned",
        known_breaks={
            "public-base": "one round of mixing gives a fine-tuned change away to a worker that knows the base "
            "checkpoint (error of the recovered change 0.28 at blocks of 32; below 1 it leaks), and more steps make "
            "it worse (docs/schemes/mix.md)",
            "zero-gradient-rows": "rows of an output gradient that are exactly zero (class-token pooling, masked "
            "labels) unmix the other rows of their block",
        },
    )

    def __init__(
        self,
        block: int = 32,
        row_block: int = 32,
        rounds: int = 1,
        condition: float = 1.0,
        *,
        insecure_small_blocks: bool = False,
    ) -> None:
        for size, least, setting in ((block, LEAST_BLOCK, "mix_block"), (row_block, LEAST_ROW_BLOCK, "mix_row_block")):
            if size < least and not insecure_small_blocks:
                raise UnsafeError(
                    f"{setting}={size}: blocks below {least} are known to be undone; use {least} or more, or set "
                    "insecure_small_blocks for an experiment"
                )
        self.block = block
        self.row_block = row_block
        self.rounds = rounds
        self.condition = condition

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """With the blocks that the settings ask for."""
        return cls(
            settings.mix_block,
            settings.mix_row_block,
            settings.mix_rounds,
            settings.mix_condition,
            insecure_small_blocks=settings.insecure_small_blocks,
        )

    def refuses(self, product: Product, x: tuple[int, ...], w: tuple[int, ...]) -> str | None:
        """Products with fewer features on one side than a block holds."""
        groups = product.groups if isinstance(product, Conv) else 1
        features, side = min((w[1], "input"), (w[0] // groups, "output"))
        if features >= self.block:
            return None
        per_group = " per group" if groups > 1 else ""
        return f"{features} {side} features{per_group}, fewer than a block of {self.block} mixes (mix_block)"

    def feature_masks(self, key: Key, inputs: int, outputs: int, groups: int) -> tuple[Mask, Mask]:
        """``A`` and ``P``; with groups, channels mix within groups and groups move among themselves."""
        if min(inputs, outputs) // groups < self.block:
            raise UnsafeError(f"{inputs} and {outputs} features cannot be mixed in {groups} blocks of {self.block}")
        order = torch.from_numpy(key.stream("groups").permutation(groups)) if groups > 1 else None
        return (
            draw_blocks(key.stream("A"), inputs, self.block, self.rounds, self.condition, order),
            draw_blocks(key.stream("P"), outputs, self.block, self.rounds, self.condition, order),
        )

    def row_mask(self, key: Key, part: int, rows: int) -> Mask:
        """``L``, of at least ``row_block`` rows."""
        return draw_blocks(key.stream(f"L{part}"), rows, self.row_block, self.rounds, self.condition)

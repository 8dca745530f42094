"""What `mix` and `mix-tuned` share: secret structured mixing of rows, input features and output features.

Every mask is permutation × block-diagonal matrix × permutation, once or twice over (``rounds``). Blocks are dense and
secret, Haar-distributed orthogonal or general with a bounded condition number. So masking stays O(elements), and what
a worker sees are sums over a whole block of rows and a whole block of features: no zero, sign or row survives. Zero
rows and columns are covered first (`tempo.schemes.cover`), and a cloak may lie on the weight (`tempo.schemes.cloak`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from tempo.errors import UnsafeError
from tempo.keys import Key
from tempo.schemes import cloak, columns, cover
from tempo.schemes.base import Empty, EncodedWeight, Problem, TallyOfWeight, Target
from tempo.schemes.masks import Mask, draw_blocks
from tempo.schemes.single import SingleMaskScheme
from tempo.settings import Settings
from tempo.wire.messages import Conv, Product

LEAST_CLOAK = 16
"""Cloaks of lower rank were removed: 4 at blocks of 8, 8 at blocks of 8 with knowledge of the data."""

ROWS_PER_MASK = 8192
"""Rows that blocks of 32 may mix under one ``A``. Of 64 independent exponential features, an attacker's best case, ICA
separated 0.33 (chance 0.31) from 8k rows and 0.85 from 16k (``benchmarks/audit/rekey.py``). What it takes grows as
the square of the block."""


@dataclass(frozen=True)
class Preset:
    """Sizes of a preset: what it starts from, and the least that it accepts."""

    rounds: int
    cloak: int
    least_block: int
    least_row_block: int
    dense_below: int = 0
    """Axes with fewer features than this are mixed by one dense block."""


class Mixing(SingleMaskScheme):
    """Blocks between permutations on rows (batch), input and output features (channels).

    Args:
        block: Least number of features mixed by one block.
        row_block: Least number of rows mixed by one block; shield rows fill up where there are fewer.
        rounds: How often each axis is mixed; None: as the preset says.
        condition: Bound on the condition number of a block; 1 for orthogonal ones.
        cloak: Rank of the cloak on ``W``, 0 for none; None: as the preset says.
        shield_rows: Random rows of high energy to add to every worker's part.
        cloak_strength: See `tempo.schemes.cloak`; for experiments.
        dense_below: Features below which an axis gets one dense block; None: as the preset says; for experiments.
        insecure_small_blocks: Allow sizes that are known to be too small, and take them as they are.

    Raises:
        UnsafeError: A size is too small.
    """

    preset: ClassVar[Preset]

    def __init__(
        self,
        block: int = 32,
        row_block: int = 32,
        rounds: int | None = None,
        condition: float = 1.0,
        *,
        cloak: int | None = None,
        shield_rows: int = 0,
        cloak_strength: float = cloak.STRENGTH,
        dense_below: int | None = None,
        insecure_small_blocks: bool = False,
    ) -> None:
        preset = self.preset
        self.block = block
        self.row_block = row_block
        self.rounds = preset.rounds if rounds is None else rounds
        self.condition = condition
        self.cloak_rank = preset.cloak if cloak is None else cloak
        self.shield_rows = shield_rows
        self.cloak_strength = cloak_strength
        self.dense_below = preset.dense_below if dense_below is None else dense_below
        self.grows = not insecure_small_blocks
        least_cloak = LEAST_CLOAK if self.cloak_rank or preset.cloak else 0
        for setting, size, least in (
            ("mix_block", block, preset.least_block),
            ("mix_row_block", row_block, preset.least_row_block),
            ("mix_rounds", self.rounds, preset.rounds),
            ("mix_cloak", self.cloak_rank, least_cloak),
            ("dense_below", self.dense_below, preset.dense_below),
        ):
            if size < least and not insecure_small_blocks:
                raise UnsafeError(
                    f"{setting}={size}: below {least}, scheme {self.name!r} is known or likely to be undone; use "
                    f"{least} or more, or set insecure_small_blocks for an experiment"
                )

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """With the sizes that the settings ask for."""
        return cls(
            settings.mix_block,
            settings.mix_row_block,
            settings.mix_rounds,
            settings.mix_condition,
            cloak=settings.mix_cloak,
            shield_rows=settings.mix_shield_rows,
            dense_below=0 if settings.insecure_small_blocks else None,
            insecure_small_blocks=settings.insecure_small_blocks,
        )

    @property
    def commutes(self) -> Literal["with any", "with rotations", "not"]:
        """Orthogonal blocks do with rotations, as long as they are kept."""
        return "with rotations" if self.condition == 1 and not self.traits.fresh_every_call else "not"

    # --- sizes ---

    def refuses(self, product: Product, x: tuple[int, ...], w: tuple[int, ...]) -> str | None:
        """Products with fewer features on one side than a block holds."""
        groups = product.groups if isinstance(product, Conv) else 1
        features, side = min((w[1], "input"), (w[0] // groups, "output"))
        if features >= self.block:
            return None
        per_group = " per group" if groups > 1 else ""
        return f"{features} {side} features{per_group}, fewer than a block of {self.block} mixes (mix_block)"

    def mixing_of(self, width: int) -> tuple[int, int]:
        """Block and rounds for an axis of ``width`` features (per group): the one rule of how sizes depend on width.

        Two rounds of blocks were solved in part for a 256-wide weight and its known base (error of the change 0.38),
        and not for a 384-wide one; only a dense rotation leaves no more than singular values at any width. So below
        ``dense_below`` the axis is one block, which needs one round.
        """
        return (width, 1) if width < self.dense_below else (self.block, self.rounds)

    def row_block_of(self, rows: int) -> int:
        """Block for so many rows under one mask of features: in many, statistics see through small ones."""
        if not self.grows or rows <= ROWS_PER_MASK:
            return self.row_block
        return max(self.row_block, math.ceil(32 * math.sqrt(rows / ROWS_PER_MASK)))

    def rows_sent(self, rows: int) -> int:
        """With shield rows: those asked for, and what a row block lacks."""
        return max(rows + self.shield_rows, self.row_block)

    def may_part(self, rows: int, parts: int) -> bool:
        """Not where more rows in one call get larger blocks: parts of it would not."""
        return super().may_part(rows, parts) and self.row_block_of(rows) == self.row_block_of(rows // parts)

    def rows_to_repeat(self, g: Tensor, x: tuple[int, ...], w: tuple[int, ...], *, want_dw: bool) -> Tensor | None:
        """The live rows, where so many are dead that this is cheaper than filling them."""
        return cover.rows_to_repeat(g, x, w, self.row_block, want_dw=want_dw)

    # --- masks ---

    def feature_masks(self, key: Key, inputs: int, outputs: int, groups: int, dtype: torch.dtype) -> tuple[Mask, Mask]:
        """``A`` and ``P``; with groups, channels mix within groups and groups move among themselves."""
        if min(inputs, outputs) // groups < self.block:
            raise UnsafeError(f"{inputs} and {outputs} features cannot be mixed in {groups} blocks of {self.block}")
        order = torch.from_numpy(key.stream("groups").permutation(groups)) if groups > 1 else None
        return (
            draw_blocks(key.stream("A"), inputs, *self.mixing_of(inputs // groups), self.condition, order, dtype),
            draw_blocks(key.stream("P"), outputs, *self.mixing_of(outputs // groups), self.condition, order, dtype),
        )

    def row_mask(self, key: Key, part: int, rows: int, dtype: torch.dtype) -> Mask:
        """``L``, of at least as many rows as a block has."""
        stream, block = key.stream(f"L{part}"), self.row_block_of(rows)
        return draw_blocks(stream, rows, block, self.rounds, self.condition, dtype=dtype)

    def cloak(self, key: Key, problem: Problem, w: Tensor) -> cloak.Cloak | None:
        """Of ``cloak_rank``."""
        if not self.cloak_rank:
            return None
        return cloak.draw(key.stream("cloak"), problem.product, w, self.cloak_rank, self.cloak_strength)

    def cover(self, key: Key, part: int, plain: Tensor) -> tuple[Tensor, cover.Cover]:
        """Fill dead rows and columns, add shield rows."""
        fillers = self.rows_sent(len(plain)) - len(plain) - self.shield_rows
        return cover.cover(key.stream(f"cover{part}"), plain, fillers, self.shield_rows)

    def encode_weight(
        self,
        problem: Problem,
        w: Tensor,
        key: Key,
        targets: Sequence[Target],
        empty: Empty,
        tally: TallyOfWeight | None = None,
    ) -> EncodedWeight:
        """As one part, or output features divided over two operators, as the preset says."""
        return columns.encode_weight(
            super().encode_weight, problem, w, key, targets, empty, self.traits.operators, self.block, tally
        )

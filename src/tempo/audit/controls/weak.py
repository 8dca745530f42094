"""Schemes weakened on purpose, for positive controls: an attack must break them before it counts. Never for use."""

from __future__ import annotations

import torch
from torch import Tensor

from tempo.keys import Key
from tempo.schemes.base import Problem
from tempo.schemes.cloak import Cloak
from tempo.schemes.masks import IDENTITY, Mask
from tempo.schemes.mix import Mix
from tempo.schemes.single import SingleMaskScheme
from tempo.schemes.tempo import Tempo


class OneSided(Mix):
    """`mix` on features alone: rows are sent unmixed and in order."""

    def __init__(self, block: int = 32, rounds: int = 1) -> None:
        super().__init__(block, 1, rounds, cloak=0, insecure_small_blocks=True)

    def row_mask(self, key: Key, part: int, rows: int, dtype: torch.dtype) -> Mask:
        """The identity."""
        return IDENTITY


class FeaturesReused(OneSided):
    """`OneSided` with ``A`` and ``P`` the same for ever, whatever happens to the weight."""

    def __init__(self, block: int = 32, rounds: int = 1) -> None:
        super().__init__(block, rounds)
        self._first: dict[tuple[int, int], tuple[Mask, Mask]] = {}

    def feature_masks(self, key: Key, inputs: int, outputs: int, groups: int, dtype: torch.dtype) -> tuple[Mask, Mask]:
        """The first that were drawn for these sizes."""
        if (inputs, outputs) not in self._first:
            self._first[inputs, outputs] = super().feature_masks(key, inputs, outputs, groups, dtype)
        return self._first[inputs, outputs]


class RowsOnly(Mix):
    """`mix` on rows alone: features are sent unmixed and in order."""

    def __init__(self, row_block: int = 32, rounds: int = 1) -> None:
        super().__init__(1, row_block, rounds, cloak=0, insecure_small_blocks=True)

    def feature_masks(self, key: Key, inputs: int, outputs: int, groups: int, dtype: torch.dtype) -> tuple[Mask, Mask]:
        """The identity, twice."""
        return IDENTITY, IDENTITY


class Uncovered(SingleMaskScheme):
    """The masks of `mix` and nothing else: rows of zeros are sent as they are, and small batches are not filled up."""

    name = Mix.name
    traits = Mix.traits

    def __init__(self, block: int = 32, row_block: int = 32, rounds: int = 1) -> None:
        self._mix = Mix(block, row_block, rounds, insecure_small_blocks=True)

    def feature_masks(self, key: Key, inputs: int, outputs: int, groups: int, dtype: torch.dtype) -> tuple[Mask, Mask]:
        """Those of `mix`."""
        return self._mix.feature_masks(key, inputs, outputs, groups, dtype)

    def row_mask(self, key: Key, part: int, rows: int, dtype: torch.dtype) -> Mask:
        """That of `mix`."""
        return self._mix.row_mask(key, part, rows, dtype)


def small_mix(block: int, row_block: int = 32, rounds: int = 1) -> Mix:
    """`mix` with blocks below the sizes that a session accepts, and no cloak."""
    return Mix(block, row_block, rounds, cloak=0, insecure_small_blocks=True)


class InputsMixed(Mix):
    """`mix` on input features alone; output features are permuted and scaled as in `tempo`, rows likewise."""

    def __init__(self, block: int = 32, rounds: int = 1) -> None:
        super().__init__(block, 1, rounds, cloak=0, insecure_small_blocks=True)

    def feature_masks(self, key: Key, inputs: int, outputs: int, groups: int, dtype: torch.dtype) -> tuple[Mask, Mask]:
        """``A`` of `mix`, ``P`` of `tempo`."""
        A, _ = super().feature_masks(key, inputs, outputs, groups, dtype)
        return A, Tempo().feature_masks(key, inputs, outputs, 1, dtype)[1]

    def row_mask(self, key: Key, part: int, rows: int, dtype: torch.dtype) -> Mask:
        """That of `tempo`."""
        return Tempo().row_mask(key, part, rows, dtype)


class StrongCloak(Mix):
    """`mix` with a cloak whose energy is as given: one that sticks out of the weight's spectrum, and so can be cut off.

    Args:
        energy: ``‖cloak‖ / ‖W‖``.
        rank: Of the cloak.
    """

    def __init__(self, energy: float, rank: int = 16) -> None:
        super().__init__(cloak=rank, insecure_small_blocks=True)
        self._energy = energy

    def cloak(self, key: Key, problem: Problem, w: Tensor) -> Cloak | None:
        """`mix`'s, scaled up."""
        found = super().cloak(key, problem, w)
        if found is None:
            return None
        scale = self._energy * w.norm() / found.cover(torch.zeros_like(w)).norm()
        return Cloak(found.product, found.U * scale, found.V)

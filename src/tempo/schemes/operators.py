"""One form of a mask, ready to apply along an axis: gathers, with block-diagonal matrices between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gather:
    """``out[i] = scale[i] * x[index[i]]``; ``scale`` None is all ones."""

    index: Tensor
    scale: Tensor | None = None

    def part(self, which: slice) -> Gather:
        """Only ``which`` of what it gives."""
        return Gather(self.index[which], None if self.scale is None else self.scale[which])


@dataclass(frozen=True)
class Blocks:
    """A block-diagonal matrix: batches (count, side, side) of blocks of one size, one batch after the other."""

    batches: tuple[Tensor, ...]


@dataclass(frozen=True)
class Operator:
    """``gathers[0]``, then ``blocks[0]``, ``gathers[1]``, and so on; there is one gather more than blocks.

    Raises:
        ValueError: A gather beside blocks has scales: nothing draws such a mask, and nothing applies it.
    """

    gathers: tuple[Gather, ...]
    blocks: tuple[Blocks, ...] = ()

    def __post_init__(self) -> None:
        if self.blocks and any(gather.scale is not None for gather in self.gathers):
            raise ValueError("an operator has scales or blocks, not both")

    @property
    def size(self) -> int:
        """Length of the axis it applies to."""
        return len(self.gathers[0].index)

    def to(self, dtype: torch.dtype) -> Operator:
        """With scales and blocks in ``dtype``."""
        return Operator(
            tuple(Gather(g.index, None if g.scale is None else g.scale.to(dtype)) for g in self.gathers),
            tuple(Blocks(tuple(batch.to(dtype) for batch in blocks.batches)) for blocks in self.blocks),
        )


def inverse_index(index: Tensor) -> Tensor:
    """The permutation that undoes ``index``."""
    return torch.empty_like(index).scatter_(0, index.long(), torch.arange(len(index), dtype=index.dtype))


def work_dtype(x: Tensor) -> torch.dtype:
    """What operators are applied in: at least float32, so that results are rounded once, into the target's dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32

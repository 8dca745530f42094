"""One form of a mask, to apply along an axis; and its steps: gathers, with block-diagonal matrices between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tempo.schemes.masks import Form, Mask


@dataclass(frozen=True)
class Gather:
    """``out[i] = scale[i] * x[index[i]]``; ``scale`` None is all ones."""

    index: Tensor
    scale: Tensor | None = None

    def part(self, which: slice) -> Gather:
        """Only ``which`` of what it gives."""
        return Gather(self.index[which], None if self.scale is None else self.scale[which])

    def reciprocal(self) -> Gather:
        """With the reciprocals of its scales."""
        return Gather(self.index, None if self.scale is None else self.scale.reciprocal())

    def transpose(self) -> Gather:
        """With what it puts at ``i`` taken from there."""
        back = torch.empty_like(self.index).scatter_(0, self.index.long(), torch.arange(len(self.index)).to(self.index))
        return Gather(back, None if self.scale is None else self.scale.index_select(0, back))


@dataclass(frozen=True)
class Blocks:
    """A block-diagonal matrix: batches (count, side, side) of blocks of one size, one batch after the other."""

    batches: tuple[Tensor, ...]


@dataclass(frozen=True)
class Steps:
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
        """Length of the axis they apply to."""
        return len(self.gathers[0].index)

    def to(self, dtype: torch.dtype) -> Steps:
        """With scales and blocks in ``dtype``."""
        return Steps(
            tuple(Gather(g.index, None if g.scale is None else g.scale.to(dtype)) for g in self.gathers),
            tuple(Blocks(tuple(batch.to(dtype) for batch in blocks.batches)) for blocks in self.blocks),
        )


@dataclass(slots=True)
class Operator:
    """One form of a mask that is not the identity."""

    mask: Mask
    form: Form

    @property
    def size(self) -> int:
        """Length of the axis it applies to."""
        return len(self.mask.gathers[0].index)

    @property
    def steps(self) -> Steps:
        """What it does, for PyTorch; kernels take the mask."""
        return self.mask.steps(self.form)


def work_dtype(x: Tensor) -> torch.dtype:
    """What operators are applied in: at least float32, so that results are rounded once, into the target's dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32

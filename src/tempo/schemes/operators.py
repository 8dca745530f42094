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

    def apply(self, x: Tensor, axis: int) -> Tensor:
        """Along ``axis``."""
        x = x.index_select(axis, self.index)
        return x if self.scale is None else x * self.scale.view(-1, *[1] * (x.dim() - 1 - axis))


@dataclass(frozen=True)
class Blocks:
    """A block-diagonal matrix: batches (count, side, side) of blocks of one size, one batch after the other."""

    batches: tuple[Tensor, ...]

    def apply(self, x: Tensor, axis: int) -> Tensor:
        """Along ``axis``, 0 or 1, of a tensor with two or three axes."""
        out = torch.empty(x.shape, dtype=x.dtype)
        start = 0
        for blocks in self.batches:
            count, side = blocks.shape[:2]
            part = slice(start, start + count * side)
            start = part.stop
            if axis == 0:
                torch.bmm(blocks, x[part].reshape(count, side, -1), out=out[part].view(count, side, -1))
            elif x.dim() == 2:
                source, target = (t[:, part].unflatten(1, (count, side)).transpose(0, 1) for t in (x, out))
                torch.bmm(source, blocks.mT, out=target)
            else:
                out[:, part] = torch.matmul(blocks, x[:, part].unflatten(1, (count, side))).flatten(1, 2)
        return out


@dataclass(frozen=True)
class Operator:
    """``gathers[0]``, then ``blocks[0]``, ``gathers[1]``, and so on; there is one gather more than blocks."""

    gathers: tuple[Gather, ...]
    blocks: tuple[Blocks, ...] = ()

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

    def apply(self, x: Tensor, axis: int) -> Tensor:
        """Along ``axis``, 0 or 1; ``x`` is of the operator's dtype."""
        x = self.gathers[0].apply(x, axis)
        for blocks, gather in zip(self.blocks, self.gathers[1:], strict=True):
            x = gather.apply(blocks.apply(x, axis), axis)
        return x


def inverse_index(index: Tensor) -> Tensor:
    """The permutation that undoes ``index``."""
    back = torch.empty_like(index)
    back[index.long()] = torch.arange(len(index), dtype=index.dtype)
    return back

"""The family of secret masks, and how they sit around each tensor of a product.

With row mask ``L`` (rows of X), ``A`` (input features) and ``P`` (output features; the design's ``B`` is ``P^-1``), in
PyTorch's weight layout ``w = Wᵀ``, each masked tensor is its plain one with an operator on axis 0 and one on axis 1::

    x~ = (L,    A^-T)        y~  = (L,    P^-T)
    w~ = (P^-T, A)           dx~ = (L^-T, A)
    g~ = (L^-T, P)           dw~ = (P,    A^-T)

The worker's products of masked tensors are then the masked products. ``g~`` needs no new key: that is the key shift of
the paper (Tempo, Xu & Fang, arXiv 2401.11531, section IV), and ``x~`` and ``w~`` are reused as the worker has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tempo import kernels
from tempo.keys import Keystream
from tempo.schemes import haar
from tempo.schemes.low_rank import LowRank
from tempo.schemes.operators import Blocks, Gather, Operator, Steps
from tempo.schemes.reply import Tally, Watch
from tempo.schemes.sandwich import sandwich


class Form(IntEnum):
    """The four operators that one mask ``M`` gives: the first bit is for the inverse, the second for the transpose."""

    PLAIN = 0
    INVERSE = 1
    TRANSPOSE = 2
    DUAL = 3

    @property
    def undo(self) -> Form:
        """The form that inverts this one."""
        return Form(self ^ 1)


@dataclass(frozen=True)
class Mask:
    """An invertible operator: generalised permutations, with block-diagonal matrices between them.

    A generalised permutation alone is the mask of `tempo`; ``rounds`` blocks between ``rounds + 1`` permutations are
    that of `mix`; no gather at all is the identity. ``inverses`` are those of ``blocks``.
    """

    gathers: tuple[Gather, ...] = ()
    blocks: tuple[Blocks, ...] = ()
    inverses: tuple[Blocks, ...] = ()

    def operator(self, form: Form) -> Operator | None:
        """``form`` of this mask, or None for the identity."""
        return Operator(self, form) if self.gathers else None

    def steps(self, form: Form) -> Steps:
        """``form`` of this mask, step by step."""
        inverted, transposed = form in (Form.INVERSE, Form.DUAL), form in (Form.TRANSPOSE, Form.DUAL)
        blocks = self.inverses if inverted else self.blocks
        if transposed:
            blocks = tuple(Blocks(tuple(batch.mT for batch in stage.batches)) for stage in blocks)
        gathers = tuple(gather.reciprocal() for gather in self.gathers) if inverted else self.gathers
        if inverted == transposed:
            return Steps(gathers, blocks)
        return Steps(tuple(gather.transpose() for gather in gathers[::-1]), blocks[::-1])

    @cached_property
    def native(self) -> Any:
        """The mask as kernels take it, in all its forms; only where there are any."""
        return kernels.native().Mask(  # type: ignore[union-attr]
            [gather.index for gather in self.gathers],
            self.gathers[0].scale,
            [stage.batches for stage in self.blocks],
            [stage.batches for stage in self.inverses],
        )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Everything the mask consists of, for the insecure record of the truth."""
        found = {}
        for number, gather in enumerate(self.gathers):
            prefix = f"{name}{number or ''}"
            found[f"{prefix}_permutation"] = gather.index
            if gather.scale is not None:
                found[f"{prefix}_scale"] = gather.scale
        for number, stage in enumerate(self.blocks):
            found |= {f"{name}{number or ''}_blocks{i}": batch for i, batch in enumerate(stage.batches)}
        return found


IDENTITY = Mask()


def draw(stream: Keystream, size: int, max_scale: int, group_order: Tensor | None = None) -> Mask:
    """Draw a generalised permutation: a uniform permutation and uniform integer scales in ``1 .. max_scale``.

    Args:
        stream: Where the randomness comes from.
        size: Elements of the axis.
        max_scale: Largest scale.
        group_order: For grouped convolutions, the permutation of the groups, shared by input and output channels;
            channels then stay within their group.
    """
    permutation = _permutation(stream, size, group_order)
    scale = stream.integers(1, max_scale, size)
    return Mask((Gather(_index(permutation), torch.from_numpy(scale.astype(np.float64))),))


def draw_signs(stream: Keystream, size: int, group_order: Tensor | None = None) -> Mask:
    """Draw a signed permutation: a uniform permutation and uniform signs; arguments as for `draw`."""
    permutation = _permutation(stream, size, group_order)
    signs = 1.0 - 2.0 * stream.integers(0, 1, size)
    return Mask((Gather(_index(permutation), torch.from_numpy(signs)),))


def draw_blocks(
    stream: Keystream,
    size: int,
    block: int,
    rounds: int,
    condition: float,
    group_order: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Mask:
    """Draw ``rounds`` block-diagonal matrices between uniform permutations.

    Args:
        stream: Where the randomness comes from.
        size: Elements of the axis.
        block: Least side of a block; a group has at least as many elements.
        rounds: How often to mix.
        condition: Bound on the blocks' condition number; 1 draws orthogonal ones.
        group_order: As for `draw`; blocks then mix within groups.
        dtype: Of the blocks: what they will be applied in, at the most.
    """
    order = np.zeros(1, dtype=np.int64) if group_order is None else group_order.numpy()
    groups, width = len(order), size // len(order)
    count = width // block
    side, larger = divmod(width, count)
    shapes = [(n, s) for n, s in ((groups * larger, side + 1), (groups * (count - larger), side)) if n]
    # All groups' larger blocks come first, so that there are two batches at most; a line of `slots` is where the
    # blocks of one group lie.
    owner = np.concatenate([np.repeat(np.arange(groups), n * s // groups) for n, s in shapes])
    slots = np.argsort(owner, kind="stable").reshape(groups, width)
    channels = np.arange(size).reshape(groups, width)

    def shuffle(source: np.ndarray, target: np.ndarray) -> Gather:
        index = np.empty(size, dtype=np.int64)
        for here, there in zip(target, source, strict=True):
            index[here] = there[stream.permutation(width)]
        return Gather(_index(index))

    gathers, stages, inverses = [shuffle(channels, slots)], [], []
    for number in range(rounds):
        drawn = [haar.blocks(stream, n, s, condition, dtype) for n, s in shapes]
        stages.append(Blocks(tuple(matrices for matrices, _ in drawn)))
        inverses.append(Blocks(tuple(inverse for _, inverse in drawn)))
        last = number == rounds - 1
        gathers.append(shuffle(slots[order], channels) if last else shuffle(slots, slots))
    return Mask(tuple(gathers), tuple(stages), tuple(inverses))


def _permutation(stream: Keystream, size: int, group_order: Tensor | None) -> np.ndarray:
    if group_order is None:
        return stream.permutation(size)
    width = size // len(group_order)
    inner = np.stack([stream.permutation(width) for _ in range(len(group_order))])
    permutation: np.ndarray = (inner + width * group_order.numpy()[:, None]).reshape(-1)
    return permutation


def _index(permutation: np.ndarray) -> Tensor:
    # 32-bit indices: column gathers run 1.7 times as fast as with 64-bit ones.
    return torch.from_numpy(permutation.astype(np.int32))


Role = Literal["x", "w", "y", "g", "dx", "dw"]
_Sides = tuple[str, Form, str, Form]
_ENCODING: dict[Role, _Sides] = {
    "x": ("L", Form.PLAIN, "A", Form.DUAL),
    "w": ("P", Form.DUAL, "A", Form.PLAIN),
    "y": ("L", Form.PLAIN, "P", Form.DUAL),
    "g": ("L", Form.DUAL, "P", Form.PLAIN),
    "dx": ("L", Form.DUAL, "A", Form.PLAIN),
    "dw": ("P", Form.PLAIN, "A", Form.DUAL),
}
_DECODING: dict[Role, _Sides] = {role: (r, of_r.undo, c, of_c.undo) for role, (r, of_r, c, of_c) in _ENCODING.items()}


@dataclass(frozen=True)
class Masks:
    """The masks around one product: any of ``L``, ``A``, ``P`` (those its tensors at hand need)."""

    L: Mask = IDENTITY
    A: Mask = IDENTITY
    P: Mask = IDENTITY

    def unsigned(self) -> Masks:
        """Those for squares of what signed permutations ``A`` and ``P`` mask."""
        return Masks(self.L, _unsigned(self.A), _unsigned(self.P))

    def encode(
        self,
        role: Role,
        plain: Tensor,
        out: Tensor,
        plus: LowRank | None = None,
        watch: Watch | None = None,
        tally: Tally | None = None,
    ) -> None:
        """Write the masked form of ``plain`` into ``out``, converting to its dtype.

        Args:
            role: What it is.
            plain: What to mask.
            out: Where to write it.
            plus: What to add to ``plain`` first, a matrix: only its factors are masked, and it is added on the way out.
            watch: Sees the rows of ``plain``: see `tempo.schemes.sandwich.sandwich`.
            tally: Sums what is written, likewise.
        """
        rows, columns = self._operators(_ENCODING[role])
        if plus is not None:
            masked = LowRank(torch.empty_like(plus.low), torch.empty_like(plus.up))
            sandwich(plus.low, rows, None, [masked.low])
            sandwich(plus.up, None, columns, [masked.up])
            plus = masked
        sandwich(plain, rows, columns, [out], watch=watch, plus=plus, tally=tally)

    def decode(
        self,
        role: Role,
        masked: Tensor,
        outs: Sequence[Tensor],
        biases: Sequence[Tensor | None] | None = None,
        plus: LowRank | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Write the plain form of ``masked`` into ``outs``: consecutive pieces by output features, plus ``biases``.

        ``plus`` is added to it, and ``watch`` sees what is read of ``masked``: see `tempo.schemes.sandwich.sandwich`.
        """
        rows, columns = self._operators(_DECODING[role])
        sandwich(masked, rows, columns, outs, 0 if role == "dw" else 1, biases, watch, plus)

    def _operators(self, sides: _Sides) -> tuple[Operator | None, Operator | None]:
        row_mask, row_form, column_mask, column_form = sides
        masks = {"L": self.L, "A": self.A, "P": self.P}
        return masks[row_mask].operator(row_form), masks[column_mask].operator(column_form)


def _unsigned(mask: Mask) -> Mask:
    return Mask(tuple(Gather(gather.index) for gather in mask.gathers), mask.blocks, mask.inverses)

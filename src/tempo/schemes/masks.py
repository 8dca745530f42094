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

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tempo.keys import Keystream

_CHUNK = 1 << 18
"""Elements handled at a time, so that the passes of one chunk stay in the second-level cache."""


@dataclass(frozen=True)
class Gather:
    """One form of a mask, ready to apply: ``out[i] = scale[i] * x[index[i]]``."""

    index: Tensor
    scale: Tensor


class Form(Enum):
    """The four operators that one mask ``M`` gives."""

    PLAIN = "M"
    INVERSE = "M^-1"
    TRANSPOSE = "M^T"
    DUAL = "M^-T"

    @property
    def undo(self) -> Form:
        """The form that inverts this one."""
        return _UNDO[self]


_UNDO = {Form.PLAIN: Form.INVERSE, Form.INVERSE: Form.PLAIN, Form.TRANSPOSE: Form.DUAL, Form.DUAL: Form.TRANSPOSE}


@dataclass(frozen=True)
class Mask:
    """A generalised permutation: row ``i`` of ``M x`` is ``scale[i] * x[permutation[i]]``.

    ``permutation`` is None for the identity.
    """

    permutation: Tensor | None
    scale: Tensor

    def gather(self, form: Form) -> Gather | None:
        """``form`` of this mask as an index and a scale, or None for the identity."""
        return None if self.permutation is None else self._forms[form]

    @cached_property
    def _forms(self) -> dict[Form, Gather]:
        index = self.permutation
        assert index is not None  # noqa: S101 - the identity never gets here
        back = torch.empty_like(index)
        back[index.long()] = torch.arange(len(index), dtype=index.dtype)
        reciprocal = self.scale.reciprocal()
        return {
            Form.PLAIN: Gather(index, self.scale),
            Form.DUAL: Gather(index, reciprocal),
            Form.INVERSE: Gather(back, reciprocal[back.long()]),
            Form.TRANSPOSE: Gather(back, self.scale[back.long()]),
        }


IDENTITY = Mask(None, torch.ones(0))


def draw(stream: Keystream, size: int, max_scale: int, group_order: Tensor | None = None) -> Mask:
    """Draw a mask: a uniform permutation and uniform integer scales in ``1 .. max_scale``.

    Args:
        stream: Where the randomness comes from.
        size: Elements of the axis.
        max_scale: Largest scale.
        group_order: For grouped convolutions, the permutation of the groups, shared by input and output channels;
            channels then stay within their group.
    """
    if group_order is None:
        permutation = stream.permutation(size)
    else:
        width = size // len(group_order)
        inner = np.stack([stream.permutation(width) for _ in range(len(group_order))])
        permutation = (inner + width * group_order.numpy()[:, None]).reshape(-1)
    scale = stream.integers(1, max_scale, size)
    # 32-bit indices: column gathers run 1.7 times as fast as with 64-bit ones.
    return Mask(torch.from_numpy(permutation.astype(np.int32)), torch.from_numpy(scale).to(torch.float64))


Role = Literal["x", "w", "y", "g", "dx", "dw"]
_FORMS: dict[Role, tuple[str, Form, str, Form]] = {
    "x": ("L", Form.PLAIN, "A", Form.DUAL),
    "w": ("P", Form.DUAL, "A", Form.PLAIN),
    "y": ("L", Form.PLAIN, "P", Form.DUAL),
    "g": ("L", Form.DUAL, "P", Form.PLAIN),
    "dx": ("L", Form.DUAL, "A", Form.PLAIN),
    "dw": ("P", Form.PLAIN, "A", Form.DUAL),
}


@dataclass(frozen=True)
class Masks:
    """The masks around one product: any of ``L``, ``A``, ``P`` (those its tensors at hand need)."""

    L: Mask = IDENTITY
    A: Mask = IDENTITY
    P: Mask = IDENTITY

    def encode(self, role: Role, plain: Tensor, out: Tensor) -> None:
        """Write the masked form of ``plain`` into ``out``, converting to its dtype."""
        rows, row_form, columns, column_form = _FORMS[role]
        sandwich(plain, getattr(self, rows).gather(row_form), getattr(self, columns).gather(column_form), out)

    def decode(
        self, role: Role, masked: Tensor, out: Tensor, *, rows: slice | None = None, cols: slice | None = None
    ) -> None:
        """Write the plain form of ``masked`` into ``out``; ``rows`` or ``cols`` selects a part of the plain tensor."""
        row_mask, row_form, column_mask, column_form = _FORMS[role]
        row = part(getattr(self, row_mask).gather(row_form.undo), rows)
        column = part(getattr(self, column_mask).gather(column_form.undo), cols)
        if row is None and rows is not None:
            masked = masked[rows]
        if column is None and cols is not None:
            masked = masked[:, cols]
        sandwich(masked, row, column, out)


def part(gather: Gather | None, which: slice | None) -> Gather | None:
    """The rows ``which`` of an operator."""
    if gather is None or which is None:
        return gather
    return Gather(gather.index[which], gather.scale[which])


def sandwich(x: Tensor, rows: Gather | None, columns: Gather | None, out: Tensor) -> None:
    """``out[i, j] = rows.scale[i] * columns.scale[j] * x[rows.index[i], columns.index[j]]``, at every position.

    Where ``x`` is a grouped convolution's weight, axis 1 counts channels within a group, and ``columns`` spans all
    groups: row ``i`` then uses the columns of its own group.
    """
    if out.numel() == 0:
        return
    if rows is None and columns is None:
        out.copy_(x)
    elif x.dim() == 2:
        _sandwich_matrix(x, rows, columns, out)
    else:
        _sandwich_planes(x, rows, columns, out)


def _work_dtype(x: Tensor) -> torch.dtype:
    # Scales are applied in at least float32 and rounded once, into the target's dtype.
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sandwich_matrix(x: Tensor, rows: Gather | None, columns: Gather | None, out: Tensor) -> None:
    height, width = out.shape
    work = _work_dtype(x)
    row_scale = None if rows is None else rows.scale.to(work).unsqueeze(1)
    column_scale = None if columns is None else columns.scale.to(work)
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, height, step):
        chunk = slice(start, start + step)
        values = x[chunk] if rows is None else x.index_select(0, rows.index[chunk])
        if columns is not None:
            values = values.index_select(1, columns.index)
        if row_scale is None:
            torch.mul(values, column_scale, out=out[chunk])  # type: ignore[arg-type]
        elif column_scale is None:
            torch.mul(values, row_scale[chunk], out=out[chunk])
        else:
            torch.mul(values, row_scale[chunk] * column_scale, out=out[chunk])


def _sandwich_planes(x: Tensor, rows: Gather | None, columns: Gather | None, out: Tensor) -> None:
    height, width = x.shape[:2]
    work = _work_dtype(x)
    row_index = torch.arange(out.shape[0]) if rows is None else rows.index.long()
    row_scale = torch.ones(len(row_index), dtype=work) if rows is None else rows.scale.to(work)
    if columns is None:
        column_index = torch.arange(width).unsqueeze(0)
        column_scale = torch.ones(1, width, dtype=work)
    else:
        # One line per group; without groups there is one, broadcast over all rows.
        groups = max(1, len(columns.index) // width)
        column_index = columns.index.long().view(groups, -1) % width
        column_scale = columns.scale.to(work).view(groups, -1)
        if groups > 1:
            column_index = column_index.repeat_interleave(len(row_index) // groups, 0)
            column_scale = column_scale.repeat_interleave(len(row_index) // groups, 0)
    planes = (row_index.unsqueeze(1) * width + column_index).view(-1)
    scale = (row_scale.unsqueeze(1) * column_scale).view(-1, 1)
    flat = x.contiguous().view(height * width, -1)
    flat_out = out.view(len(planes), -1)
    step = max(1, _CHUNK // max(1, flat.shape[1]))
    for start in range(0, len(planes), step):
        chunk = slice(start, start + step)
        torch.mul(flat.index_select(0, planes[chunk]), scale[chunk], out=flat_out[chunk])

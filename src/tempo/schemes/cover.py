"""Cover: random values where an operand is zero, so that every row and feature takes part in its mask.

A row of ``G`` that is exactly zero stays out of the sums of its block: a block with one live row shows that row's
column of ``L`` in clear. The same goes for a zero row of ``X``, and for a feature that is zero in all rows: it gives
``X~`` a null vector that is a column of ``A`` (``G~``: of ``P``). So before masking, dead rows and columns are
*filled* with Gaussian numbers of the operand's own root mean square, and *shield rows* are appended: rows filled from
the start. Afterwards what the fill added is taken off again, with ``R`` and ``Q`` what was filled into ``X`` and
``G``::

    Y  -= R[:, columns] W[:, columns]ᵀ        Y[dead rows of X] = 0
    dX -= Q[:, columns] W[columns]            dX[dead rows of G] = 0
    dW -= G[filled]ᵀ X[filled]                dW[dead columns of G] = dW[:, dead columns of X] = 0

where ``filled`` are the rows filled in either, shield rows among them. Where many rows of ``G`` are dead it is
cheaper to send the live ones alone, under fresh masks: see `rows_to_repeat`. For convolutions rows are images and
columns are channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tempo import kernels
from tempo.keys import Keystream
from tempo.schemes import haar
from tempo.schemes.operators import work_dtype
from tempo.wire.layout import empty_like

FAINT = 1e-20
"""Scale of what covers an operand that is all zero: not zero, and lost in any optimizer's epsilon."""

SHIELD_ENERGY = 4.0
"""Mean square of the shield rows that a setting asks for, relative to that of real rows."""

MASK_MULTIPLICATIONS = 200
"""Masking or unmasking one element takes about as long as this many multiplications of a matrix product on the same
core: 10 ns by ``benchmarks/mask_speed.py``, at 20 multiplications per nanosecond."""

_NONE = torch.empty(0, dtype=torch.int64)

_SAMPLE = 64
"""Rows, about, whose root mean square stands for all."""


@dataclass(frozen=True)
class Cover:
    """What was filled into an operand."""

    real: int
    """Rows that are the operand's own."""
    rows: Tensor
    """Those of them that were dead, ascending."""
    columns: Tensor
    """Columns that were dead, ascending; not looked for where all rows are."""
    filled: Tensor
    """What went into the dead rows, then the rows that were appended."""

    @property
    def filled_columns(self) -> Tensor:
        """Dead columns that were filled: all or none.

        As many appended rows as live ones leave no column nearly dead, and in few rows zeros meet by chance.
        """
        return self.columns[:0] if self.real - len(self.rows) <= len(self.shield) else self.columns

    @property
    def empty(self) -> bool:
        """Whether the operand was all zero."""
        return len(self.rows) == self.real

    @property
    def needless(self) -> bool:
        """Whether nothing was zero, and nothing was filled in."""
        return not (len(self.filled) or len(self.columns))

    @property
    def shield(self) -> Tensor:
        """The rows that were appended."""
        return self.filled[len(self.rows) :]


def uncovered(plain: Tensor) -> Cover:
    """The cover of an operand that is sent as it is."""
    return Cover(len(plain), _NONE, _NONE, plain[:0])


def cover(stream: Keystream, plain: Tensor, fillers: int = 0, shields: int = 0) -> tuple[Tensor, Cover]:
    """Fill dead rows and columns, and append rows.

    Args:
        stream: Where the randomness comes from.
        plain: The operand, rows first, features second.
        fillers: Rows to append, of the root mean square of live ones.
        shields: Rows to append, of `SHIELD_ENERGY` times their energy.

    Returns:
        What to mask (``plain`` itself where nothing was to be done), and what was filled in.
    """
    real, appended = len(plain), fillers + shields
    rows = dead_rows(plain)
    live = real - len(rows)
    columns = _dead_columns(plain) if live else rows[:0]
    if not appended and not len(rows) and not len(columns):
        return plain, uncovered(plain)
    scale = _rms(plain, rows) * math.sqrt(plain.shape[1] / max(1, plain.shape[1] - len(columns)))
    covered = empty_like(plain, (real + appended, *plain.shape[1:]), plain.dtype)
    covered[:real] = plain
    if live > appended:
        _fill(stream, covered[:real], 1, columns, scale)
    last = torch.arange(real, real + appended)
    _fill(stream, covered, 0, torch.cat([rows, last[:fillers]]), scale)
    _fill(stream, covered, 0, last[fillers:], scale * SHIELD_ENERGY**0.5)
    return covered, Cover(real, rows, columns, covered.index_select(0, torch.cat([rows, last])))


def dead_rows(x: Tensor) -> Tensor:
    """Rows that are exactly zero; nothing is squared, so that small values count."""
    native = kernels.native()
    if native is None:
        return (~x.any(1).view(len(x), -1).any(1)).nonzero().squeeze(1)
    maps, dead = _maps(x), torch.empty(len(x), dtype=torch.bool)
    kernels.rows_in_parts(lambda rows: native.dead_rows(maps[rows], dead[rows]), len(x), x[:1].numel())
    return dead.nonzero().squeeze(1)


def _dead_columns(x: Tensor) -> Tensor:
    """Features that are exactly zero in all rows."""
    native = kernels.native()
    if native is None:
        return (~x.any(0).view(x.shape[1], -1).any(1)).nonzero().squeeze(1)
    dead = torch.empty(x.shape[1], dtype=torch.bool)
    native.dead_columns(_maps(x), dead)
    return dead.nonzero().squeeze(1)


def _maps(x: Tensor) -> Tensor:
    """``x`` as rows × positions × columns, as kernels take it: a view of what is laid out in any usual way."""
    return x.detach().movedim(1, -1).reshape(len(x), prod(x.shape[2:]), x.shape[1])


def _rms(x: Tensor, dead: Tensor) -> float:
    """Of some rows that are not dead; divided by the largest element first, lest squares underflow."""
    alive = torch.ones(len(x), dtype=torch.bool)
    alive[dead] = False
    rows = alive.nonzero().squeeze(1)
    few = x.index_select(0, rows[:: max(1, len(rows) // _SAMPLE)])
    peak = float(torch.linalg.vector_norm(few, torch.inf)) if len(few) else 0.0
    if not peak > 0:
        return FAINT
    square = (few / peak).square_().mean(dtype=torch.promote_types(x.dtype, torch.float32))
    return peak * math.sqrt(float(square))


def _fill(stream: Keystream, x: Tensor, axis: int, where: Tensor, scale: float) -> None:
    if len(where):
        shape = [len(where) if number == axis else size for number, size in enumerate(x.shape)]
        count = len(where) * (x.numel() // x.shape[axis])
        x.index_copy_(axis, where, (haar.gaussians(stream, count, work_dtype(x)) * scale).to(x.dtype).view(shape))


def rows_to_repeat(g: Tensor, x: tuple[int, ...], w: tuple[int, ...], multiple: int, *, want_dw: bool) -> Tensor | None:
    """Which rows of a call to send again by themselves for this gradient, instead of filling the dead ones; or None.

    A filled row costs its masking, and the multiplications of its share of ``dW``. Sending again costs masking the
    weight afresh, and the live rows of ``X``. Whichever is cheaper, by `MASK_MULTIPLICATIONS`.

    Args:
        g: The gradient, rows first.
        x: Shape of the input.
        w: Shape of the weight.
        multiple: A row block. Dead rows complete the live ones to a multiple of it, so that workers learn how many
            are live rounded up only; there is one block at least.
        want_dw: Whether ``dW`` will be asked for, and so ``X`` needed.
    """
    dead = dead_rows(g)
    if not len(dead):
        return None
    live = len(g) - len(dead)
    padding = min(len(dead), max(1, -(-live // multiple)) * multiple - live)
    x_row, g_row = prod(x[1:]), prod(g.shape[1:])
    spared = len(dead) - padding
    filling = spared * (x_row + g_row) * MASK_MULTIPLICATIONS
    repeating = prod(w) * MASK_MULTIPLICATIONS
    if want_dw:
        filling += spared * g_row * prod(w[1:]) if live else 0
        repeating += (live + padding) * x_row * MASK_MULTIPLICATIONS
    if filling <= repeating:
        return None
    kept = torch.ones(len(g), dtype=torch.bool)
    kept[dead[padding:]] = False
    return kept.nonzero().squeeze(1)

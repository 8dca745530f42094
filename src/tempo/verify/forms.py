"""Sums of operands and answers with secret vectors, for matrices and for convolutions.

Each form reads a tensor once, in pieces that stay in the cache, converted there where they are of half precision. Sums
with ``k`` vectors have those on the axis before the last. What is left, in order, are the rows: of matrices (T), of
convolutions (groups, pixels of all images); of weights the output features, (m) and (groups, m/groups).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from math import prod
from typing import final

import torch
from torch import Tensor

from tempo.schemes.reply import MOST_WATCHED, Tally
from tempo.verify.sums import Sums, of_both, of_rows, tallied
from tempo.verify.taps import over_taps
from tempo.wire.messages import Conv, Product


class Form(ABC):
    """Where rows, features and groups are in the tensors of a product."""

    groups: int = 1

    def __init__(self, work: torch.dtype) -> None:
        self.work = work

    @abstractmethod
    def weight(self, w: Tensor, r: Tensor, v: Tensor, tally: Tally | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept of a weight.

        Args:
            w: As sent.
            r: (groups, k, m/groups).
            v: (groups, k, d/groups).
            tally: What `tally` gave of the two, after ``w`` was written.

        Returns:
            ``Σ_o r_o w[o]`` as `inputs` takes it; ``Σ_c v_c w[:, c]`` as `gradients` takes it; the Frobenius norm of
            each group, to be multiplied with lengths of rows, float64.
        """

    @abstractmethod
    def as_kernel(self, z: Tensor, w: tuple[int, ...]) -> Tensor:
        """Vectors ``z`` (groups, k, elements of an output feature) as `inputs` takes them."""

    @abstractmethod
    def inputs(
        self, x: Tensor, kernels: list[Tensor], tally: Tally | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Sums of the rows of ``x`` with each of ``kernels``; lengths of the rows; length of all rows of a group.

        ``tally`` is what `tally` gave, after ``x`` was written.
        """

    @abstractmethod
    def gradients(
        self,
        g: Tensor,
        kernel: Tensor | None,
        q: Tensor | None,
        x: tuple[int, ...],
        tally: Tally | None = None,
    ) -> tuple[Sums | None, Sums | None]:
        """Sums of the rows of ``g`` with ``kernel``, and of its output features with ``q`` (what `inputs` gave)."""

    def tally(self, kernels: list[Tensor], q: Tensor | None = None) -> Tally | None:
        """What has sums of `weight`, `inputs` or `gradients` made while an operand is written; None where it cannot be.

        Args:
            kernels: One at least.
            q: As `gradients` takes it.
        """
        return None

    def summed_with(self, vectors: Tensor) -> Tensor | None:
        """``vectors`` (groups, k, features) as (k, features), if sums of an answer's rows may be made elsewhere."""
        return None

    @abstractmethod
    def rows(self, answer: Tensor, into: Tensor | None, vectors: Tensor) -> Sums:
        """Sums of the rows of ``y`` or ``dx`` with ``vectors`` (groups, k, features).

        Args:
            answer: Read once.
            into: Where to copy it in the same pass, if anywhere: sums are of what lies there.
            vectors: Those.
        """

    @abstractmethod
    def features(self, dw: Tensor, into: Tensor | None, z: Tensor) -> Sums:
        """Sums of the output features of ``dw`` with ``z`` (groups, k, elements of an output feature), as `rows`."""


def form(product: Product, work: torch.dtype) -> Form:
    """The form of ``product``, with sums in ``work``: float32 or float64."""
    return Convolutions(product, work) if isinstance(product, Conv) else Matrices(work)


@final
class Matrices(Form):
    """Rows first, features second."""

    def weight(self, w: Tensor, r: Tensor, v: Tensor, tally: Tally | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(k, d), (k, m), a scalar."""
        from_inputs, from_outputs = tallied(tally) or of_both(w, v[0], r[0])
        assert from_outputs is not None  # noqa: S101 - asked for
        return from_outputs.sums, from_inputs.sums, torch.linalg.vector_norm(from_inputs.lengths)

    def as_kernel(self, z: Tensor, w: tuple[int, ...]) -> Tensor:
        """(k, d)."""
        return z[0]

    def summed_with(self, vectors: Tensor) -> Tensor | None:
        """If the kernels can."""
        return vectors[0] if self.work == torch.float32 and vectors.shape[1] <= MOST_WATCHED else None

    def tally(self, kernels: list[Tensor], q: Tensor | None = None) -> Tally | None:
        """In single precision."""
        return Tally(_joined(kernels, 0), q) if self.work == torch.float32 else None

    def inputs(
        self, x: Tensor, kernels: list[Tensor], tally: Tally | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Sums (k, T)."""
        made = tallied(tally)
        found = of_rows(x, _joined(kernels, 0)) if made is None else made[0]
        sums = found.sums.split_with_sizes([kernel.shape[0] for kernel in kernels])
        return list(sums), found.lengths, torch.linalg.vector_norm(found.lengths)

    def gradients(
        self,
        g: Tensor,
        kernel: Tensor | None,
        q: Tensor | None,
        x: tuple[int, ...],
        tally: Tally | None = None,
    ) -> tuple[Sums | None, Sums | None]:
        """Sums (k, T) and (k, m)."""
        if (made := tallied(tally)) is not None:
            return made
        if q is None:
            return None if kernel is None else of_rows(g, kernel), None
        rows, columns = of_both(g, q.new_empty(0, g.shape[1]) if kernel is None else kernel, q)
        return None if kernel is None else rows, columns

    def rows(self, answer: Tensor, into: Tensor | None, vectors: Tensor) -> Sums:
        """Sums (k, T)."""
        return of_rows(answer, vectors[0], into)

    def features(self, dw: Tensor, into: Tensor | None, z: Tensor) -> Sums:
        """Sums (k, m)."""
        return self.rows(dw, into, z)


@final
class Convolutions(Form):
    """Images first, channels second. A row is a pixel of an image, in one group of channels.

    Sums are convolutions as well, with ``k`` channels in place of those of the answer: kernels here are (groups, k,
    channels of a group, sizes of the kernel).

    The length of a pixel is that of what the kernel covers there. Fast algorithms (Winograd, FFT) spread rounding
    errors over a tile or a whole image, so where a kernel has several taps every pixel counts as long as the longest of
    its image.
    """

    def __init__(self, product: Conv, work: torch.dtype) -> None:
        super().__init__(work)
        self.product = product
        self.groups = product.groups

    def weight(self, w: Tensor, r: Tensor, v: Tensor, tally: Tally | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """A kernel of k output channels per group, one of k input channels per group, (groups, 1)."""
        features = self._features(w)
        found = [of_both(of, r.new_empty(0, of.shape[1]), vectors) for of, vectors in zip(features, r, strict=True)]
        from_outputs = torch.stack([columns.sums for _, columns in found])
        by_group = features.view(*features.shape[:2], w.shape[1], prod(w.shape[2:])).to(self.work)
        from_inputs = (v.unsqueeze(1) @ by_group).unflatten(-1, w.shape[2:]).transpose(1, 2)
        length = torch.stack([torch.linalg.vector_norm(rows.lengths, dim=0, keepdim=True) for rows, _ in found])
        return self.as_kernel(from_outputs, tuple(w.shape)), from_inputs, length

    def as_kernel(self, z: Tensor, w: tuple[int, ...]) -> Tensor:
        """A kernel of k output channels per group."""
        kernel: Tensor = z.unflatten(2, w[1:])
        return kernel

    def summed_with(self, vectors: Tensor) -> Tensor | None:
        """If the kernels can: channels of one group that lie side by side."""
        fits = self._native() and vectors.shape[1] <= MOST_WATCHED
        return vectors[0] if fits else None

    def tally(self, kernels: list[Tensor], q: Tensor | None = None) -> Tally | None:
        """Of lengths and columns: sums with vectors are of several pixels."""
        if not self._native():
            return None
        return Tally(kernels[0].new_empty(0, kernels[0].shape[2]), None if q is None else q[0].contiguous())

    def inputs(
        self, x: Tensor, kernels: list[Tensor], tally: Tally | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Sums (groups, k, pixels of ``y``)."""
        kernel, lengths = _joined(kernels, 1), self._lengths(x, tallied(tally))
        sums, longest, length = over_taps(self.product, x, kernel, lengths)
        return list(sums.split_with_sizes([k.shape[1] for k in kernels], 1)), longest, length

    def gradients(
        self,
        g: Tensor,
        kernel: Tensor | None,
        q: Tensor | None,
        x: tuple[int, ...],
        tally: Tally | None = None,
    ) -> tuple[Sums | None, Sums | None]:
        """Sums (groups, k, pixels of ``x``) and (groups, k, m/groups)."""
        columns, rows, made = None, None, tallied(tally)
        if made is not None and made[1] is not None:
            columns = _stacked([made[1]])
        elif q is not None:
            none = q.new_empty(0, g.shape[1] // self.groups)
            columns = _stacked([of_both(of, none, vectors)[1] for of, vectors in zip(self._pixels(g), q, strict=True)])
        if kernel is not None:
            sums, longest, _ = over_taps(self.product, g, kernel, self._lengths(g, made), x[2:])
            rows = Sums(sums, longest)
        return rows, columns

    def rows(self, answer: Tensor, into: Tensor | None, vectors: Tensor) -> Sums:
        """Sums (groups, k, pixels)."""
        if into is not None and (self.groups > 1 or not into.movedim(1, -1).is_contiguous()):
            answer, into = into.copy_(answer), None
        return self._each(vectors, self._pixels(answer), None if into is None else self._pixels(into))

    def features(self, dw: Tensor, into: Tensor | None, z: Tensor) -> Sums:
        """Sums (groups, k, m/groups)."""
        if into is not None and not into.is_contiguous():
            dw, into = into.copy_(dw), None
        return self._each(z, self._features(dw), None if into is None else self._features(into))

    def _each(self, vectors: Tensor, parts: Iterable[Tensor], copies: Iterable[Tensor] | None) -> Sums:
        """Sums of the rows of each group's part, copied in the same pass if anywhere."""
        places = [None] * self.groups if copies is None else copies
        return _stacked([of_rows(*of_one) for of_one in zip(parts, vectors, places, strict=True)])

    def _features(self, w: Tensor) -> Tensor:
        """A weight as (groups, output features of a group, elements of one)."""
        return w.reshape(self.groups, w.shape[0] // self.groups, -1)

    def _pixels(self, t: Tensor) -> list[Tensor]:
        """The channels of each group, pixels first: views where channels lie last, else copies."""
        pixels = t.movedim(1, -1).reshape(t.numel() // max(1, t.shape[1]), t.shape[1])
        return list(pixels.split(t.shape[1] // self.groups, 1))

    def _native(self) -> bool:
        """Whether the kernels can sum maps while they read or write them."""
        return self.groups == 1 and self.product.channels_last and self.work == torch.float32

    def _lengths(self, t: Tensor, made: tuple[Sums, Sums | None] | None) -> Tensor:
        """Lengths (groups, pixels) of the pixels of ``t``, if they were not ``made``."""
        if made is not None:
            return made[0].lengths.unsqueeze(0)
        none = t.new_empty(0, t.shape[1] // self.groups, dtype=self.work)
        return torch.stack([of_rows(of, none).lengths for of in self._pixels(t)])


def _joined(kernels: list[Tensor], dim: int) -> Tensor:
    """All of them, along the axis of vectors."""
    return kernels[0] if len(kernels) == 1 else torch.cat(kernels, dim)


def _stacked(found: list[Sums]) -> Sums:
    """One for each group."""
    return Sums(torch.stack([of.sums for of in found]), torch.stack([of.lengths for of in found]))

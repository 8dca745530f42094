"""Sums of operands and answers with secret vectors, for matrices and for convolutions.

Each form reads a tensor once, in pieces that stay in the cache, converted there where they are of half precision. Sums
with ``k`` vectors have those on the axis before the last. What is left, in order, are the rows: of matrices (T), of
convolutions (N, groups, pixels); of weights the output features, (m) and (groups, m/groups).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Final, final

import torch
from torch import Tensor

from tempo.schemes import arithmetic
from tempo.verify.norms import lengths as lengths_of
from tempo.verify.norms import lost, out_of_range
from tempo.wire.messages import Conv, Linear, Product

_PIECE: Final = 1 << 19
"""Elements worked on at a time: what stays in a core's cache."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of the rows of an operand, and how long the rows are (float64)."""

    sums: Tensor
    lengths: Tensor


class Form(ABC):
    """Where rows, features and groups are in the tensors of a product."""

    groups: int = 1

    def __init__(self, work: torch.dtype) -> None:
        self.work = work

    def _pieces(self, t: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Parts of ``t`` along axis 0, in the dtype that sums are kept in, each with its start."""
        step = max(1, _PIECE // max(1, prod(t.shape[1:])))
        for start in range(0, max(len(t), 1), step):
            yield start, t[start : start + step].to(self.work)

    @abstractmethod
    def seen_from_outputs(self, w: Tensor, r: Tensor) -> Tensor:
        """``Σ_o r_o w[o]``, as `inputs` takes it; ``r`` is (groups, k, m/groups)."""

    @abstractmethod
    def seen_from_inputs(self, w: Tensor, v: Tensor) -> Tensor:
        """``Σ_c v_c w[:, c]``, as `gradients` takes it; ``v`` is (groups, k, d/groups)."""

    @abstractmethod
    def as_kernel(self, z: Tensor, w: tuple[int, ...]) -> Tensor:
        """Vectors ``z`` (groups, k, elements of an output feature) as `inputs` takes them."""

    @abstractmethod
    def inputs(self, x: Tensor, kernels: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Sums of the rows of ``x`` with each of ``kernels``; lengths of the rows; length of all rows of a group."""

    @abstractmethod
    def gradients(
        self, g: Tensor, kernel: Tensor | None, q: Tensor | None, x: tuple[int, ...]
    ) -> tuple[Sums | None, Sums | None]:
        """Sums of the rows of ``g`` with ``kernel``, and of its output features with ``q`` (what `inputs` gave)."""

    @abstractmethod
    def rows(self, answer: Tensor, vectors: Tensor, *, lengths: bool) -> Sums:
        """Sums of the rows of ``y`` or ``dx`` with ``vectors`` (groups, k, features)."""

    @abstractmethod
    def features(self, dw: Tensor, z: Tensor, *, lengths: bool) -> Sums:
        """Sums of the output features of ``dw`` with ``z`` (groups, k, elements of an output feature)."""

    @abstractmethod
    def length(self, w: Tensor) -> Tensor:
        """Frobenius norm of a weight, per group; to be multiplied with lengths of rows. Float64."""


def form(product: Product, work: torch.dtype) -> Form:
    """The form of ``product``, with sums in ``work``: float32 or float64."""
    return Matrices(work) if isinstance(product, Linear) else Convolutions(product, work)


@final
class Matrices(Form):
    """Rows first, features second."""

    def seen_from_outputs(self, w: Tensor, r: Tensor) -> Tensor:
        """(k, d)."""
        total = r.new_zeros(r.shape[1], w.shape[1])
        for start, piece in self._pieces(w):
            total.addmm_(r[0, :, start : start + len(piece)], piece)
        return total

    def seen_from_inputs(self, w: Tensor, v: Tensor) -> Tensor:
        """(k, m)."""
        return torch.cat([v[0] @ piece.t() for _, piece in self._pieces(w)], 1)

    def as_kernel(self, z: Tensor, w: tuple[int, ...]) -> Tensor:
        """(k, d)."""
        return z[0]

    def inputs(self, x: Tensor, kernels: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Sums (k, T)."""
        kernel = torch.cat(kernels)
        sums, lengths = [kernel.new_empty(len(kernel), 0)], [x.new_empty(0, dtype=torch.float64)]
        for _, piece in self._pieces(x):
            sums.append(kernel @ piece.t())
            lengths.append(lengths_of(piece, 1))
        length = torch.cat(lengths)
        return list(torch.cat(sums, 1).split([len(k) for k in kernels])), length, torch.linalg.vector_norm(length)

    def gradients(
        self, g: Tensor, kernel: Tensor | None, q: Tensor | None, x: tuple[int, ...]
    ) -> tuple[Sums | None, Sums | None]:
        """Sums (k, T) and (k, m)."""
        rows = [g.new_empty(0 if kernel is None else len(kernel), 0, dtype=self.work)]
        lengths = [g.new_empty(0, dtype=torch.float64)]
        columns = g.new_zeros(0 if q is None else len(q), g.shape[1], dtype=self.work)
        squares = g.new_zeros(g.shape[1], dtype=torch.float64)
        ones = g.new_ones(g.shape[1], dtype=self.work)
        for start, piece in self._pieces(g):
            if kernel is not None:
                rows.append(kernel @ piece.t())
            if q is None:
                lengths.append(lengths_of(piece, 1))
                continue
            columns.addmm_(q[:, start : start + len(piece)], piece)
            square = piece.square()
            of_rows = square @ ones
            if out_of_range(of_rows.sqrt()):
                square = piece.double().square_()
                of_rows = square @ ones.double()
            lengths.append(of_rows.double().sqrt_() + lost(self.work, g.shape[1]))
            squares += (ones.new_ones(len(piece), dtype=square.dtype) @ square).double()
        of_features = None if q is None else Sums(columns, squares.sqrt_() + lost(self.work, len(g)))
        return None if kernel is None else Sums(torch.cat(rows, 1), torch.cat(lengths)), of_features

    def rows(self, answer: Tensor, vectors: Tensor, *, lengths: bool) -> Sums:
        """Sums (k, T)."""
        sums, norms = [vectors.new_empty(vectors.shape[1], 0)], [answer.new_zeros(0, dtype=torch.float64)]
        for _, piece in self._pieces(answer):
            sums.append(vectors[0] @ piece.t())
            norms.append(lengths_of(piece, 1) if lengths else piece.new_zeros(len(piece), dtype=torch.float64))
        return Sums(torch.cat(sums, 1), torch.cat(norms))

    def features(self, dw: Tensor, z: Tensor, *, lengths: bool) -> Sums:
        """Sums (k, m)."""
        return self.rows(dw, z, lengths=lengths)

    def length(self, w: Tensor) -> Tensor:
        """A scalar."""
        rows = [lengths_of(piece, 1) for _, piece in self._pieces(w)]
        length: Tensor = torch.linalg.vector_norm(torch.cat(rows))
        return length


@final
class Convolutions(Form):
    """Images first, channels second. A row is a pixel of an image, in one group of channels.

    The length of a pixel is that of what the kernel covers there. Fast algorithms (Winograd, FFT) spread rounding
    errors over a tile or a whole image, so where a kernel has several taps every pixel counts as long as the longest of
    its image.
    """

    def __init__(self, product: Conv, work: torch.dtype) -> None:
        super().__init__(work)
        self.product = product
        self.groups = product.groups

    def seen_from_outputs(self, w: Tensor, r: Tensor) -> Tensor:
        """A kernel of k output channels per group."""
        return torch.bmm(r, self._features(w)).view(-1, *w.shape[1:])

    def seen_from_inputs(self, w: Tensor, v: Tensor) -> Tensor:
        """A kernel of k input channels per group."""
        by_group = w.reshape(self.groups, -1, w.shape[1], prod(w.shape[2:])).to(self.work)
        return torch.einsum("gkc,goct->gokt", v, by_group).reshape(w.shape[0], -1, *w.shape[2:])

    def as_kernel(self, z: Tensor, w: tuple[int, ...]) -> Tensor:
        """A kernel of k output channels per group."""
        return z.reshape(-1, *w[1:])

    def inputs(self, x: Tensor, kernels: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Sums (N, groups, k, pixels of ``y``)."""
        taps = kernels[0].shape[2:]
        split = [k.view(self.groups, -1, *k.shape[1:]) for k in kernels]
        kernel = torch.cat(split, 1).flatten(0, 1)
        ones = kernel.new_ones(self.groups, 1, *taps)
        sums, lengths, squares = [], [], kernel.new_zeros(self.groups, dtype=torch.float64)
        for _, piece in self._pieces(x):
            sums.append(self._by_group(self._push(piece, kernel)))
            of_pixels = self._squares(piece, partial(self._push, kernel=ones))
            squares += of_pixels.sum((0, 2))
            lengths.append(self._lengths(of_pixels, taps))
        return (
            list(torch.cat(sums).split([k.shape[1] for k in split], 2)),
            torch.cat(lengths),
            squares.sqrt_().unsqueeze_(1),
        )

    def gradients(
        self, g: Tensor, kernel: Tensor | None, q: Tensor | None, x: tuple[int, ...]
    ) -> tuple[Sums | None, Sums | None]:
        """Sums (N, groups, k, pixels of ``x``) and (groups, k, m/groups)."""
        features = g.shape[1] // self.groups
        rows, lengths = [], []
        columns = g.new_zeros(self.groups, 0 if q is None else q.shape[2], features, dtype=self.work)
        squares = g.new_zeros(self.groups, features, dtype=torch.float64)
        for start, piece in self._pieces(g):
            if kernel is not None:
                rows.append(self._by_group(self._pull(piece, kernel, x[2:])))
                ones = kernel.new_ones(self.groups, 1, *kernel.shape[2:])
                of_pixels = self._squares(piece, partial(self._pull, kernel=ones, pixels=x[2:]))
                lengths.append(self._lengths(of_pixels, kernel.shape[2:]))
            if q is not None:
                by_group = self._by_group(piece)
                columns += (q[start : start + len(piece)] @ by_group.mT).sum(0)
                squares += lengths_of(by_group, 3).square_().sum(0)
        of_rows = None if kernel is None else Sums(torch.cat(rows), torch.cat(lengths))
        return of_rows, None if q is None else Sums(columns, squares.sqrt_())

    def rows(self, answer: Tensor, vectors: Tensor, *, lengths: bool) -> Sums:
        """Sums (N, groups, k, pixels)."""
        sums, norms = [], []
        for _, piece in self._pieces(answer):
            by_group = self._by_group(piece)
            sums.append(vectors @ by_group)
            pixels = (len(piece), self.groups, by_group.shape[3])
            norms.append(lengths_of(by_group, 2) if lengths else by_group.new_zeros(pixels, dtype=torch.float64))
        return Sums(torch.cat(sums), torch.cat(norms))

    def features(self, dw: Tensor, z: Tensor, *, lengths: bool) -> Sums:
        """Sums (groups, k, m/groups)."""
        by_group = self._features(dw)
        sums = z @ by_group.mT
        return Sums(sums, lengths_of(by_group, 2) if lengths else sums.new_zeros((), dtype=torch.float64))

    def length(self, w: Tensor) -> Tensor:
        """(groups, 1)."""
        length: Tensor = torch.linalg.vector_norm(lengths_of(self._features(w), 2), dim=1, keepdim=True)
        return length

    def _features(self, w: Tensor) -> Tensor:
        """A weight as (groups, output features of a group, elements of one)."""
        return w.reshape(self.groups, w.shape[0] // self.groups, -1).to(self.work)

    def _by_group(self, t: Tensor) -> Tensor:
        """(N, channels, …) as (N, groups, channels of a group, pixels)."""
        return t.reshape(len(t), self.groups, t.shape[1] // self.groups, prod(t.shape[2:]))

    def _push(self, x: Tensor, kernel: Tensor) -> Tensor:
        """From input pixels to output pixels."""
        return arithmetic.output(self.product, x, kernel.to(x.dtype))

    def _pull(self, g: Tensor, kernel: Tensor, pixels: tuple[int, ...]) -> Tensor:
        """From output pixels to input pixels."""
        shape = (len(g), self.groups * kernel.shape[1], *pixels)
        return arithmetic.input_gradient(self.product, g, kernel.to(g.dtype), shape)

    def _squares(self, piece: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """Squared lengths (N, groups, pixels) of what a kernel covers, float64."""

        def over_channels(t: Tensor) -> Tensor:
            squares = t.square().view(len(t), self.groups, t.shape[1] // self.groups, *t.shape[2:]).sum(2)
            return gather(squares).flatten(2).double()

        found = over_channels(piece)
        if out_of_range(found.sqrt()):
            return over_channels(piece.double()).clamp_min_(0)
        return found.clamp_min_(0) + lost(piece.dtype, piece.shape[1] // self.groups) ** 2

    def _lengths(self, squares: Tensor, taps: tuple[int, ...]) -> Tensor:
        """Of pixels; where a kernel has several taps, of the longest in each image and group."""
        if prod(taps) > 1 and squares.shape[2]:
            squares = squares.amax(2, keepdim=True)
        return squares.sqrt()

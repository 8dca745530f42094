"""Sums of operands and answers with secret vectors, for matrices and for convolutions.

Each form reads a tensor once, in pieces that stay in the cache, converted there where they are of half precision. Sums
with ``k`` vectors have those on the axis before the last. What is left, in order, are the rows: of matrices (T), of
convolutions (N, groups, pixels); of weights the output features, (m) and (groups, m/groups).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from math import prod
from typing import final

import torch
from torch import Tensor

from tempo.schemes import arithmetic
from tempo.schemes.reply import MOST_WATCHED
from tempo.verify.norms import lengths as lengths_of
from tempo.verify.norms import lost, out_of_range
from tempo.verify.sums import Sums, of_both, of_rows, pieces
from tempo.wire.messages import Conv, Linear, Product


class Form(ABC):
    """Where rows, features and groups are in the tensors of a product."""

    groups: int = 1

    def __init__(self, work: torch.dtype) -> None:
        self.work = work

    @abstractmethod
    def weight(self, w: Tensor, r: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept of a weight.

        Args:
            w: As sent.
            r: (groups, k, m/groups).
            v: (groups, k, d/groups).

        Returns:
            ``Σ_o r_o w[o]`` as `inputs` takes it; ``Σ_c v_c w[:, c]`` as `gradients` takes it; the Frobenius norm of
            each group, to be multiplied with lengths of rows, float64.
        """

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

    def summed_with(self, vectors: Tensor) -> Tensor | None:
        """``vectors`` (groups, k, features) as (k, features), if sums of an answer's rows may be made elsewhere."""
        return None

    @abstractmethod
    def rows(self, answer: Tensor, into: Tensor | None, vectors: Tensor, *, lengths: bool) -> Sums:
        """Sums of the rows of ``y`` or ``dx`` with ``vectors`` (groups, k, features).

        Args:
            answer: Read once.
            into: Where to copy it in the same pass, if anywhere: sums are of what lies there.
            vectors: Those.
            lengths: Whether lengths are wanted; else they may be zeros.
        """

    @abstractmethod
    def features(self, dw: Tensor, into: Tensor | None, z: Tensor, *, lengths: bool) -> Sums:
        """Sums of the output features of ``dw`` with ``z`` (groups, k, elements of an output feature), as `rows`."""


def form(product: Product, work: torch.dtype) -> Form:
    """The form of ``product``, with sums in ``work``: float32 or float64."""
    return Matrices(work) if isinstance(product, Linear) else Convolutions(product, work)


@final
class Matrices(Form):
    """Rows first, features second."""

    def weight(self, w: Tensor, r: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(k, d), (k, m), a scalar."""
        from_inputs, from_outputs = of_both(w, v[0], r[0])
        return from_outputs.sums, from_inputs.sums, torch.linalg.vector_norm(from_inputs.lengths)

    def as_kernel(self, z: Tensor, w: tuple[int, ...]) -> Tensor:
        """(k, d)."""
        return z[0]

    def summed_with(self, vectors: Tensor) -> Tensor | None:
        """If the kernels can."""
        return vectors[0] if self.work == torch.float32 and vectors.shape[1] <= MOST_WATCHED else None

    def inputs(self, x: Tensor, kernels: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Sums (k, T)."""
        found = of_rows(x, torch.cat(kernels))
        sums = list(found.sums.split([len(kernel) for kernel in kernels]))
        return sums, found.lengths, torch.linalg.vector_norm(found.lengths)

    def gradients(
        self, g: Tensor, kernel: Tensor | None, q: Tensor | None, x: tuple[int, ...]
    ) -> tuple[Sums | None, Sums | None]:
        """Sums (k, T) and (k, m)."""
        if q is None:
            return None if kernel is None else of_rows(g, kernel), None
        rows, columns = of_both(g, q.new_empty(0, g.shape[1]) if kernel is None else kernel, q)
        return None if kernel is None else rows, columns

    def rows(self, answer: Tensor, into: Tensor | None, vectors: Tensor, *, lengths: bool) -> Sums:
        """Sums (k, T)."""
        return of_rows(answer, vectors[0], lengths=lengths, into=into)

    def features(self, dw: Tensor, into: Tensor | None, z: Tensor, *, lengths: bool) -> Sums:
        """Sums (k, m)."""
        return self.rows(dw, into, z, lengths=lengths)


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

    def weight(self, w: Tensor, r: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A kernel of k output channels per group, one of k input channels per group, (groups, 1)."""
        features = self._features(w)
        from_outputs = torch.bmm(r, features).view(-1, *w.shape[1:])
        by_group = features.view(*features.shape[:2], w.shape[1], prod(w.shape[2:]))
        from_inputs = torch.einsum("gkc,goct->gokt", v, by_group).reshape(w.shape[0], -1, *w.shape[2:])
        return from_outputs, from_inputs, torch.linalg.vector_norm(lengths_of(features, 2), dim=1, keepdim=True)

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
        for _, piece in pieces(x, self.work):
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
        for start, piece in pieces(g, self.work):
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

    def rows(self, answer: Tensor, into: Tensor | None, vectors: Tensor, *, lengths: bool) -> Sums:
        """Sums (N, groups, k, pixels)."""
        sums, norms = [], []
        for _, piece in pieces(answer, self.work, into):
            by_group = self._by_group(piece)
            sums.append(vectors @ by_group)
            pixels = (len(piece), self.groups, by_group.shape[3])
            norms.append(lengths_of(by_group, 2) if lengths else by_group.new_zeros(pixels, dtype=torch.float64))
        return Sums(torch.cat(sums), torch.cat(norms))

    def features(self, dw: Tensor, into: Tensor | None, z: Tensor, *, lengths: bool) -> Sums:
        """Sums (groups, k, m/groups)."""
        by_group = self._features(dw if into is None else into.copy_(dw))
        sums = z @ by_group.mT
        return Sums(sums, lengths_of(by_group, 2) if lengths else sums.new_zeros((), dtype=torch.float64))

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

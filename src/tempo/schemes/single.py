"""Schemes with one masked copy of each operand: rows divided among workers, each part under a row mask of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from tempo.errors import UnsafeError
from tempo.keys import Key
from tempo.schemes.base import (
    Empty,
    EncodedGradient,
    EncodedInput,
    EncodedWeight,
    Operand,
    Problem,
    Scheme,
    Target,
)
from tempo.schemes.masks import Mask, Masks


class SingleMaskScheme(Scheme):
    """Base of `insecure-plain` and `tempo`: what differs is only how the masks are drawn."""

    @abstractmethod
    def feature_masks(self, key: Key, inputs: int, outputs: int, groups: int) -> tuple[Mask, Mask]:
        """Draw ``A`` over ``inputs`` and ``P`` over ``outputs`` features."""

    @abstractmethod
    def row_mask(self, key: Key, part: int, rows: int) -> Mask:
        """Draw ``L`` for the rows of one worker's part."""

    def encode_weight(
        self, problem: Problem, w: Tensor, key: Key, targets: Sequence[Target], empty: Empty
    ) -> EncodedWeight:
        """Mask once, then copy: every worker may see the same masked bytes."""
        A, P = self.feature_masks(key, w.shape[1] * problem.groups, w.shape[0], problem.groups)
        masks = Masks(A=A, P=P)
        whole = slice(0, w.shape[0])
        operands = [
            Operand(target.worker, {"w": empty(target.worker, tuple(w.shape), problem.wire_dtype)}, whole)
            for target in targets
        ]
        # A send buffer can be shared with its worker, which must not get to change what others are sent.
        source = operands[0].tensors["w"] if len(operands) == 1 else torch.empty(w.shape, dtype=problem.wire_dtype)
        masks.encode("w", w, source)
        for operand in operands if len(operands) > 1 else ():
            operand.tensors["w"].copy_(source)
        return MaskedWeight(self, problem, masks, operands)


def divide(rows: int, targets: Sequence[Target]) -> list[tuple[Target, slice]]:
    """Cut ``rows`` into consecutive parts in proportion to the targets' shares; empty parts are left out."""
    total = sum(target.share for target in targets)
    parts, start, covered = [], 0, 0.0
    for number, target in enumerate(targets):
        covered += target.share
        end = rows if number == len(targets) - 1 else min(rows, round(rows * covered / total))
        if end > start:
            parts.append((target, slice(start, end)))
        start = max(start, end)
    return parts


class MaskedWeight(EncodedWeight):
    """``w~`` and the masks ``A`` and ``P``."""

    def __init__(self, scheme: SingleMaskScheme, problem: Problem, masks: Masks, operands: list[Operand]) -> None:
        self.scheme = scheme
        self.problem = problem
        self.masks = masks
        self.operands = operands

    def encode_input(self, x: Tensor, key: Key, targets: Sequence[Target], empty: Empty) -> EncodedInput:
        """Mask each worker's rows under their own ``L``."""
        masked = MaskedInput(self, tuple(x.shape), x.dtype)
        for number, (target, rows) in enumerate(divide(x.shape[0], targets)):
            height = rows.stop - rows.start
            masks = Masks(self.scheme.row_mask(key, number, height), self.masks.A, self.masks.P)
            x_masked = empty(target.worker, (height, *x.shape[1:]), self.problem.wire_dtype)
            masks.encode("x", x[rows], x_masked)
            masked.parts[target.worker] = (rows, masks)
            masked.operands.append(Operand(target.worker, {"x": x_masked}, rows))
        return masked


class MaskedInput(EncodedInput):
    """``x~`` in parts, and the masks of each."""

    def __init__(self, weight: MaskedWeight, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.weight = weight
        self.shape = shape
        self.dtype = dtype
        self.parts: dict[int, tuple[slice, Masks]] = {}
        self.operands: list[Operand] = []
        self._gradient_encoded = False

    def secrets(self, worker: int) -> dict[str, Tensor]:
        """``L``, ``A`` and ``P`` as permutations and scales; identities are left out."""
        masks = self.parts[worker][1]
        found = {}
        for name, mask in (("l", masks.L), ("a", masks.A), ("p", masks.P)):
            if mask.permutation is not None:
                found[f"{name}_permutation"] = mask.permutation
                found[f"{name}_scale"] = mask.scale
        return found

    def decode_output(self, replies: dict[int, Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Unmask each part's columns straight into the output they belong to."""
        spatial = next(iter(replies.values())).shape[2:]
        outputs = [torch.empty(self.shape[0], size, *spatial, dtype=self.dtype) for size in sizes]
        for worker, (rows, masks) in self.parts.items():
            start = 0
            for output in outputs:
                cols = slice(start, start + output.shape[1]) if len(outputs) > 1 else None
                masks.decode("y", replies[worker], output[rows], cols=cols)
                start += output.shape[1]
        return outputs

    def encode_gradient(self, g: Tensor, key: Key, empty: Empty) -> EncodedGradient:
        """Mask ``G`` with the shifted keys: no new mask is drawn."""
        if self._gradient_encoded:
            raise UnsafeError("a second gradient would meet the same masks: encode the input again first")
        self._gradient_encoded = True
        masked = MaskedGradient(self)
        for worker, (rows, masks) in self.parts.items():
            part = g[rows]
            g_masked = empty(worker, tuple(part.shape), self.weight.problem.wire_dtype)
            masks.encode("g", part, g_masked)
            masked.operands.append(Operand(worker, {"g": g_masked}, rows))
        return masked


class MaskedGradient(EncodedGradient):
    """``g~``; decodes with the masks of the input it belongs to."""

    def __init__(self, source: MaskedInput) -> None:
        self.source = source
        self.operands: list[Operand] = []

    def decode_input_gradient(self, replies: dict[int, Tensor]) -> Tensor:
        """Unmask each part of ``dX`` into place."""
        dx = torch.empty(self.source.shape, dtype=self.source.dtype)
        for worker, (rows, masks) in self.source.parts.items():
            masks.decode("dx", replies[worker], dx[rows])
        return dx

    def decode_weight_gradient(self, replies: dict[int, Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Sum the workers' parts in the masked domain (``A`` and ``P`` are shared), then unmask once."""
        parts = list(replies.values())
        total = parts[0]
        if len(parts) > 1:
            total = parts[0].to(self.source.dtype)
            for other in parts[1:]:
                total = total + other
        masks = self.source.weight.masks
        gradients, start = [], 0
        for size in sizes:
            out = torch.empty(size, *total.shape[1:], dtype=self.source.dtype)
            masks.decode("dw", total, out, rows=slice(start, start + size) if len(sizes) > 1 else None)
            gradients.append(out)
            start += size
        return gradients

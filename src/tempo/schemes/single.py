"""Schemes with one masked copy of each operand: rows divided among workers, each part under a row mask of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

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
from tempo.schemes.shield import shield_rows, weight_gradient


class SingleMaskScheme(Scheme):
    """Base of `insecure-plain`, `tempo` and `mix`: what differs is only how the masks are drawn."""

    row_block = 1
    """Rows that a part needs at least; shield rows fill it up."""

    def rows_sent(self, rows: int) -> int:
        """With shield rows, for one worker."""
        return max(rows, self.row_block)

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
            plain, shield = x[rows], None
            if len(plain) < self.scheme.row_block:
                shield = shield_rows(key.stream(f"shield{number}"), plain, self.scheme.row_block - len(plain))
                plain = torch.cat([plain, shield])
            masks = Masks(self.scheme.row_mask(key, number, len(plain)), self.masks.A, self.masks.P)
            x_masked = empty(target.worker, tuple(plain.shape), self.problem.wire_dtype)
            masks.encode("x", plain, x_masked)
            masked.parts[target.worker] = Part(rows, masks, shield)
            masked.operands.append(Operand(target.worker, {"x": x_masked}, rows))
        return masked


@dataclass(frozen=True, slots=True)
class Part:
    """The rows that one worker gets, their masks, and the shield rows below them."""

    rows: slice
    masks: Masks
    shield: Tensor | None


class MaskedInput(EncodedInput):
    """``x~`` in parts, and the masks of each."""

    def __init__(self, weight: MaskedWeight, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.weight = weight
        self.shape = shape
        self.dtype = dtype
        self.parts: dict[int, Part] = {}
        self.operands: list[Operand] = []
        self._gradient_encoded = False

    def secrets(self, worker: int) -> dict[str, Tensor]:
        """What ``L``, ``A`` and ``P`` consist of, identities left out, and the shield rows if there are any."""
        part = self.parts[worker]
        found = part.masks.L.tensors("l") | part.masks.A.tensors("a") | part.masks.P.tensors("p")
        return found if part.shield is None else found | {"x_shield": part.shield}

    def decode_output(self, replies: dict[int, Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Unmask each part's columns straight into the output they belong to."""
        spatial = next(iter(replies.values())).shape[2:]
        outputs = [torch.empty(self.shape[0], size, *spatial, dtype=self.dtype) for size in sizes]
        for worker, part in self.parts.items():
            pieces = [output[part.rows] for output in outputs]
            if part.shield is None:
                part.masks.decode("y", replies[worker], *pieces)
                continue
            whole = torch.empty(replies[worker].shape, dtype=self.dtype)
            part.masks.decode("y", replies[worker], whole)
            for piece, values in zip(pieces, whole[: len(pieces[0])].split(list(sizes), 1), strict=True):
                piece.copy_(values)
        return outputs

    def encode_gradient(self, g: Tensor, key: Key, empty: Empty) -> EncodedGradient:
        """Mask ``G`` with the shifted keys: no new mask is drawn."""
        if self._gradient_encoded:
            raise UnsafeError("a second gradient would meet the same masks: encode the input again first")
        self._gradient_encoded = True
        masked = MaskedGradient(self)
        for number, (worker, part) in enumerate(self.parts.items()):
            plain = g[part.rows]
            if part.shield is not None:
                shield = shield_rows(key.stream(f"shield{number}"), plain, len(part.shield))
                masked.shields.append((part.shield, shield))
                plain = torch.cat([plain, shield])
            g_masked = empty(worker, tuple(plain.shape), self.weight.problem.wire_dtype)
            part.masks.encode("g", plain, g_masked)
            masked.operands.append(Operand(worker, {"g": g_masked}, part.rows))
        return masked


class MaskedGradient(EncodedGradient):
    """``g~``; decodes with the masks of the input it belongs to."""

    def __init__(self, source: MaskedInput) -> None:
        self.source = source
        self.operands: list[Operand] = []
        self.shields: list[tuple[Tensor, Tensor]] = []
        """Shield rows of ``X`` and ``G``, for each part that has some."""

    def decode_input_gradient(self, replies: dict[int, Tensor]) -> Tensor:
        """Unmask each part of ``dX`` into place."""
        dx = torch.empty(self.source.shape, dtype=self.source.dtype)
        for worker, part in self.source.parts.items():
            if part.shield is None:
                part.masks.decode("dx", replies[worker], dx[part.rows])
                continue
            whole = torch.empty(replies[worker].shape, dtype=self.source.dtype)
            part.masks.decode("dx", replies[worker], whole)
            dx[part.rows] = whole[: -len(part.shield)]
        return dx

    def decode_weight_gradient(self, replies: dict[int, Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Sum the workers' parts in the masked domain (``A`` and ``P`` are shared), then unmask once."""
        parts = list(replies.values())
        total = parts[0]
        if len(parts) > 1:
            total = parts[0].to(self.source.dtype)
            for other in parts[1:]:
                total = total + other
        weight, dtype = self.source.weight, self.source.dtype
        # What shield rows added is taken off before rounding to half precision.
        work = torch.promote_types(dtype, torch.float32) if self.shields else dtype
        gradients = [torch.empty(size, *total.shape[1:], dtype=work) for size in sizes]
        weight.masks.decode("dw", total, *gradients)
        for x, g in self.shields:
            extra = weight_gradient(weight.problem.product, x, g, tuple(total.shape))
            for gradient, part in zip(gradients, extra.split(list(sizes)), strict=True):
                gradient -= part
        return [gradient.to(dtype) for gradient in gradients]

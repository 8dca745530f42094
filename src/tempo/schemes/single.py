"""Schemes with one masked copy of each operand: rows divided among workers, each part under a row mask of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

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
    Recall,
    Scheme,
    Tallies,
    TallyOfWeight,
    Target,
    UpdatableWeight,
)
from tempo.schemes.cloak import Cloak, Lying, together
from tempo.schemes.corrections import Share, WeightGradient, shares_of_input_gradient, shares_of_output
from tempo.schemes.cover import Cover, uncovered
from tempo.schemes.low_rank import LowRank, add_all
from tempo.schemes.masks import Mask, Masks
from tempo.schemes.operators import work_dtype
from tempo.schemes.reply import Passed, Reply, Tally
from tempo.schemes.total import Total, summed
from tempo.wire.layout import maps
from tempo.wire.messages import Rule

SQUARES = ("exp_avg_sq", "max_exp_avg_sq")
"""What optimizers keep that knows no signs."""


class SingleMaskScheme(Scheme):
    """Base of `insecure-plain`, `tempo` and the presets of mixing: they differ in masks, cloak and cover."""

    @abstractmethod
    def feature_masks(self, key: Key, inputs: int, outputs: int, groups: int, dtype: torch.dtype) -> tuple[Mask, Mask]:
        """Draw ``A`` over ``inputs`` and ``P`` over ``outputs`` features, to be applied in ``dtype``."""

    @abstractmethod
    def row_mask(self, key: Key, part: int, rows: int, dtype: torch.dtype) -> Mask:
        """Draw ``L`` for the rows of one worker's part, to be applied in ``dtype``."""

    def cloak(self, key: Key, problem: Problem, w: Tensor) -> Cloak | None:
        """Draw what is added to ``w`` before masking; None adds nothing."""
        return None

    def cover(self, key: Key, part: int, plain: Tensor) -> tuple[Tensor, Cover]:
        """Cover a part of ``X`` or ``G``; appends as many rows to either. By default it is sent as it is."""
        return plain, uncovered(plain)

    def encode_weight(
        self,
        problem: Problem,
        w: Tensor,
        key: Key,
        targets: Sequence[Target],
        empty: Empty,
        tally: TallyOfWeight | None = None,
    ) -> EncodedWeight:
        """Mask once, then copy: every worker may see the same masked bytes."""
        A, P = self.feature_masks(key, w.shape[1] * problem.groups, w.shape[0], problem.groups, work_dtype(w))
        masks = Masks(A=A, P=P)
        whole = slice(0, w.shape[0])
        operands = [
            Operand(target.worker, {"w": empty(target.worker, tuple(w.shape), problem.wire_dtype)}, whole)
            for target in targets
        ]
        cloak = self.cloak(key, problem, w)
        # A send buffer can be shared with its worker, which must not get to change what others are sent.
        alone = len(operands) == 1
        source = operands[0].tensors["w"] if alone else torch.empty(w.shape, dtype=problem.wire_dtype)
        of_one = tally(operands[0].worker, source) if alone and tally is not None else None
        _encode_cloaked(masks, "w", w, cloak, source, of_one)
        for operand in operands if len(operands) > 1 else ():
            operand.tensors["w"].copy_(source)
        return MaskedWeight(self, problem, masks, cloak, operands)


def _encode_cloaked(
    masks: Masks, role: Literal["w", "dw"], w: Tensor, cloak: Cloak | None, out: Tensor, tally: Tally | None = None
) -> None:
    """Mask ``w`` with a cloak on it: in the same pass, where that is of low rank as a matrix."""
    plus = None if cloak is None else cloak.factors
    if cloak is not None and plus is None:
        w = cloak.cover(w)
    masks.encode(role, w, out, plus=plus, tally=tally)


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


class MaskedWeight(UpdatableWeight):
    """``w~``, the masks ``A`` and ``P``, and the cloaks under them."""

    def __init__(
        self,
        scheme: SingleMaskScheme,
        problem: Problem,
        masks: Masks,
        cloak: Cloak | None,
        operands: list[Operand],
    ) -> None:
        self.scheme = scheme
        self.problem = problem
        self.masks = masks
        self.operands = operands
        self._kept: set[str] = set()
        self._lying = [] if cloak is None else [Lying(cloak, {"w": torch.ones((), dtype=torch.float64)})]

    @property
    def cloak(self) -> Cloak | None:
        """All that lies on the weight by now, as one cloak."""
        return self._cloak_on("w")

    def encode_kept(self, name: str, plain: Tensor, key: Key, out: Tensor, *, linear: bool) -> None:
        """Under a cloak of its own, where the optimizer is linear and the scheme cloaks weights.

        Without one it would link these masks to those that it was under before: singular vectors line up.
        """
        if name in SQUARES:
            self.masks.unsigned().encode("dw", plain, out)
            return
        cloak = self.scheme.cloak(key, self.problem, plain) if linear else None
        if cloak is not None:
            self._lying.append(Lying(cloak, {name: torch.ones((), dtype=torch.float64)}))
        _encode_cloaked(self.masks, "dw", plain, cloak, out)
        self._kept.add(name)
        for lying in self._lying:  # what the worker has counts as there, even where this cloak is not on it
            for kept in self._kept:
                lying.counts.setdefault(kept, torch.zeros((), dtype=torch.float64))

    def decode_kept(self, name: str, masked: Tensor) -> Tensor:
        """Unmask, and take off what lies on it by now."""
        plain = torch.empty(masked.shape, dtype=masked.dtype)
        masks = self.masks.unsigned() if name in SQUARES else self.masks
        cloak = self._cloak_on(name)
        plus = None if cloak is None else LowRank(cloak.U, cloak.V.neg())
        masks.decode("w" if name == "w" else "dw", masked, [plain], plus=plus)
        return plain

    def keeps_length(self, name: str) -> bool:
        """Unless a cloak lies on it: feature masks that commute with optimizers are orthogonal."""
        return self._cloak_on(name) is None

    def discard(self) -> None:
        """The gradient's cloak went with it."""
        for lying in self._lying:
            lying.counts.pop("gradient", None)

    def follow(self, rule: Rule, scale: float) -> None:
        """Change all cloaks as the worker's arithmetic does."""
        for lying in self._lying:
            lying.follow(rule, scale)

    def _cloak_on(self, name: str) -> Cloak | None:
        found = [(lying.cloak, float(lying.counts.get(name, 0.0))) for lying in self._lying]
        found = [(cloak, count) for cloak, count in found if count]
        if len(found) == 1 and found[0][1] == 1.0:
            return found[0][0]
        return together(found) if found else None

    def encode_input(
        self,
        x: Tensor,
        key: Key,
        targets: Sequence[Target],
        empty: Empty,
        w: Recall,
        tallies: Tallies | None = None,
    ) -> EncodedInput:
        """Mask each worker's rows under their own ``L``."""
        masked = MaskedInput(self, tuple(x.shape), x.dtype)
        product = self.problem.product
        for number, (target, rows) in enumerate(divide(x.shape[0], targets)):
            covered, cover = self.scheme.cover(key, number, x[rows])
            L = self.scheme.row_mask(key, number, len(covered), work_dtype(x))
            masks = Masks(L, self.masks.A, self.masks.P)
            x_masked = empty(target.worker, tuple(covered.shape), self.problem.wire_dtype)
            watch = None if masked.cloak is None else masked.cloak.watch_input(covered)
            masks.encode("x", covered, x_masked, watch=watch, tally=(tallies or {}).get(target.worker))
            filled = cover.filled_columns
            shares = shares_of_output(product, covered[: cover.real], filled, w) if len(filled) else []
            seen = None if masked.cloak is None else masked.cloak.seen_by_input(covered, watch)
            masked.parts[target.worker] = Part(rows, masks, cover, shares, seen)
            masked.operands.append(Operand(target.worker, {"x": x_masked}, rows))
        return masked


@dataclass(slots=True)
class Part:
    """The rows that one worker gets, their masks, and what is to be taken off its answer."""

    rows: slice
    masks: Masks
    cover: Cover
    shares: list[Share]
    seen_by_cloak: Tensor | None

    @property
    def covered(self) -> bool:
        """Whether there was anything filled in."""
        return bool(len(self.cover.filled) or self.shares)


class MaskedInput(EncodedInput):
    """``x~`` in parts, and the masks of each."""

    def __init__(self, weight: MaskedWeight, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.weight = weight
        self.cloak = weight.cloak
        self.shape = shape
        self.dtype = dtype
        self.parts: dict[int, Part] = {}
        self.operands: list[Operand] = []
        self._gradient_encoded = False

    def secrets(self, worker: int) -> dict[str, Tensor]:
        """What ``L``, ``A`` and ``P`` consist of, identities left out; shield rows and cloak if there are any."""
        part, cloak = self.parts[worker], self.cloak
        found = part.masks.L.tensors("l") | part.masks.A.tensors("a") | part.masks.P.tensors("p")
        if len(part.cover.shield):
            found["x_shield"] = part.cover.shield
        if cloak is not None:
            found |= {"cloak_u": cloak.U, "cloak_v": cloak.V}
        return found

    def decode_output(
        self,
        replies: dict[int, Reply],
        sizes: Sequence[int],
        biases: Sequence[Tensor | None] = (),
        added: Sequence[LowRank | None] = (),
    ) -> list[Tensor]:
        """Unmask each part's columns straight into the output they belong to, where nothing is to be taken off."""
        spatial = next(iter(replies.values())).shape[2:]
        product = self.weight.problem.product
        outputs = [maps(product, (self.shape[0], size, *spatial), self.dtype) for size in sizes]
        bias = _joined(biases, sizes, outputs[0])
        for worker, part in self.parts.items():
            pieces = [output[part.rows] for output in outputs]
            cloak, seen = self.cloak, part.seen_by_cloak
            plus = None if cloak is None or seen is None else cloak.in_output(seen)
            part.seen_by_cloak = None  # a graph may live long
            uncover = seen is not None and plus is None
            if not (part.covered or uncover):
                replies[worker].read(partial(part.masks.decode, "y", outs=pieces, biases=biases or None, plus=plus))
                continue
            whole = _room(pieces, replies[worker])
            replies[worker].read(partial(part.masks.decode, "y", outs=[whole], biases=[bias], plus=plus))
            if cloak is not None and seen is not None and uncover:
                cloak.uncover_output(whole, seen)
            y = whole[: part.cover.real]
            for share in part.shares:
                share.take_off_output(y)
            if len(part.cover.rows):
                y[part.cover.rows] = 0 if bias is None else bias.to(y.dtype).view(-1, *[1] * (y.dim() - 2))
            if whole is not pieces[0]:
                for piece, values in zip(pieces, y.split(list(sizes), 1), strict=True):
                    piece.copy_(values)
            part.shares = []
        add_all(outputs, added)
        return outputs

    def encode_gradient(
        self,
        g: Tensor,
        key: Key,
        empty: Empty,
        x: Recall,
        w: Recall,
        *,
        want_dw: bool,
        tallies: Tallies | None = None,
    ) -> EncodedGradient:
        """Mask ``G`` with the shifted keys: no new mask is drawn."""
        if self._gradient_encoded:
            raise UnsafeError("a second gradient would meet the same masks: encode the input again first")
        self._gradient_encoded = True
        weight = self.weight
        product = weight.problem.product
        masked = MaskedGradient(self, next(iter(weight.operands)).tensors["w"].shape)
        totals: list[Tensor | None] = []
        for number, (worker, part) in enumerate(self.parts.items()):
            plain, tally = g[part.rows], (tallies or {}).get(worker)
            covered, cover = weight.scheme.cover(key, number, plain)
            g_masked = empty(worker, tuple(covered.shape), weight.problem.wire_dtype)
            watch = None if self.cloak is None else self.cloak.watch_gradient(covered)
            # Of what is rounded on its way, or covered, the sum would be another.
            exact = g_masked.dtype == torch.float32 and covered is plain
            total = Total(part.masks, len(plain), tally) if exact and tally is not None else None
            part.masks.encode("g", covered, g_masked, watch=watch, tally=tally if total is None else total.tally)
            totals.append(None if total is None else total.made())
            masked.operands.append(Operand(worker, {"g": g_masked}, part.rows))
            seen = None if self.cloak is None else self.cloak.seen_by_gradient(covered, watch)
            filled = cover.filled_columns
            shares = shares_of_input_gradient(product, covered[: cover.real], filled, w) if len(filled) else []
            masked.parts[worker] = Part(part.rows, part.masks, cover, shares, seen)
            if want_dw:
                masked.extra.add(part.cover, cover, covered, partial(_rows, x, part.rows))
        masked.total = summed(totals)
        if want_dw:
            masked.extra.complete(g, x)
        return masked


class MaskedGradient(EncodedGradient):
    """``g~``; decodes with the masks of the input it belongs to."""

    def __init__(self, source: MaskedInput, shape: tuple[int, ...]) -> None:
        self.source = source
        self.operands: list[Operand] = []
        self.parts: dict[int, Part] = {}
        self.extra = WeightGradient(source.weight.problem.product, tuple(shape))

    @property
    def corrects_weight_gradient(self) -> bool:
        """Where anything was filled."""
        return self.extra.needed

    def decode_input_gradient(self, replies: dict[int, Reply], added: LowRank | None = None) -> Tensor:
        """Unmask each part of ``dX`` into place."""
        source = self.source
        dx = maps(source.weight.problem.product, source.shape, source.dtype)
        for worker, part in self.parts.items():
            place, cloak, seen = dx[part.rows], source.cloak, part.seen_by_cloak
            plus = None if cloak is None or seen is None else cloak.in_input_gradient(seen)
            uncover = seen is not None and plus is None
            if not (part.covered or uncover):
                replies[worker].read(partial(part.masks.decode, "dx", outs=[place], plus=plus))
                continue
            whole = _room([place], replies[worker])
            replies[worker].read(partial(part.masks.decode, "dx", outs=[whole], plus=plus))
            if cloak is not None and seen is not None and uncover:
                cloak.uncover_input_gradient(whole, seen)
            real = whole[: part.cover.real]
            for share in part.shares:
                share.take_off_input_gradient(real)
            real[part.cover.rows] = 0
            if whole is not place:
                place.copy_(real)
        add_all([dx], [added])
        return dx

    def decode_weight_gradient(self, replies: dict[int, Reply], sizes: Sequence[int]) -> list[Tensor]:
        """Sum the workers' parts in the masked domain (``A`` and ``P`` are shared), then unmask once."""
        (first, *others), dtype, masks = list(replies.values()), self.source.dtype, self.source.weight.masks
        if others:
            total = first.checked().to(dtype)
            for other in others:
                total = total + other.checked()
            first = Passed(total)
        if not self.extra.needed:
            gradients = [torch.empty(size, *first.shape[1:], dtype=dtype) for size in sizes]
            first.read(partial(masks.decode, "dw", outs=gradients))
            return gradients
        whole = torch.empty(first.shape, dtype=torch.promote_types(dtype, torch.float32))
        first.read(partial(masks.decode, "dw", outs=[whole]))
        self.extra.take_off(whole)
        return [part.to(dtype, copy=len(sizes) > 1) for part in whole.split(list(sizes))]


def _room(places: Sequence[Tensor], reply: Reply) -> Tensor:
    """Where to unmask ``reply`` for corrections: right in its place, if that is one, exact enough and large enough."""
    (place, *more), work = places, work_dtype(places[0])
    fits = not more and place.dtype == work and place.shape == reply.shape
    return place if fits else torch.empty(reply.shape, dtype=work)


def _joined(biases: Sequence[Tensor | None], sizes: Sequence[int], like: Tensor) -> Tensor | None:
    """One bias for outputs of ``sizes`` features that lie side by side; None if there is none at all."""
    if all(bias is None for bias in biases):
        return None
    parts = zip(biases, sizes, strict=True)
    return torch.cat([like.new_zeros(size) if bias is None else bias.to(like.dtype) for bias, size in parts])


def _rows(x: Recall, rows: slice) -> Tensor:
    return x()[rows]

"""Output features divided over two operators: a secret random half to each, under masks that have nothing in common.

An operator's workers see ``X`` and one half of the columns of ``Y``, rows of ``W``; columns of ``G``, rows of ``dW``.
``dX`` is the sum of what both return. Neither sees the other's half of a weight, so neither holds a masked form of
the whole matrix. ``X`` travels twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tempo.keys import Key
from tempo.schemes.base import (
    Empty,
    EncodedGradient,
    EncodedInput,
    EncodedWeight,
    Operand,
    Problem,
    Recall,
    Tallies,
    TallyOfWeight,
    Target,
)
from tempo.schemes.low_rank import LowRank, add_all
from tempo.schemes.reply import Reply
from tempo.schemes.sandwich import add_biases

EncodeWeight = Callable[[Problem, Tensor, Key, Sequence[Target], Empty, TallyOfWeight | None], EncodedWeight]


def encode_weight(
    encode: EncodeWeight,
    problem: Problem,
    w: Tensor,
    key: Key,
    targets: Sequence[Target],
    empty: Empty,
    operators: int,
    least: int,
    tally: TallyOfWeight | None = None,
) -> EncodedWeight:
    """Mask ``w`` in as many parts as ``targets`` have distinct operators, at most ``operators``.

    Args:
        encode: Masks one part.
        problem: The product.
        w: Output features first.
        key: Fresh.
        targets: Workers of one or more operators.
        empty: Gives send buffers.
        operators: In how many parts to divide.
        least: Features that a part needs, in every group: a narrower weight goes to the first operator alone.
        tally: What to sum of a part.
    """
    parties = list(dict.fromkeys(target.operator for target in targets))[:operators]
    if len(parties) == 1:
        return encode(problem, w, key, targets, empty, tally)
    width = len(w) // problem.groups
    count = min(len(parties), max(1, width // least))
    # The same number of each group's features, so that every part is a grouped product too.
    stream = key.stream("columns")
    order = torch.stack([torch.from_numpy(stream.permutation(width)) + i * width for i in range(problem.groups)])
    parts = []
    for number, operator in enumerate(parties[:count]):
        mine = order[:, number * width // count : (number + 1) * width // count].sort(1).values.flatten()
        members = [target for target in targets if target.operator == operator]
        part = encode(problem, w.index_select(0, mine), key.branch(f"part{number}"), members, empty, tally)
        parts.append((operator, mine, part))
    return DividedWeight(parts)


def _addressed(operands: Sequence[Operand], columns: Tensor) -> list[Operand]:
    return [replace(operand, columns=columns) for operand in operands]


def _part_of_weight(w: Recall, columns: Tensor) -> Tensor:
    return w().index_select(0, columns)


class DividedWeight(EncodedWeight):
    """A masked weight in parts: each with the operator that holds it, and the output features that it consists of."""

    def __init__(self, parts: Sequence[tuple[str, Tensor, EncodedWeight]]) -> None:
        self.parts = parts
        self.operands = [o for _, columns, part in parts for o in _addressed(part.operands, columns)]

    def encode_input(
        self,
        x: Tensor,
        key: Key,
        targets: Sequence[Target],
        empty: Empty,
        w: Recall,
        tallies: Tallies | None = None,
    ) -> EncodedInput:
        """All of ``X`` to each operator, divided among its workers."""
        parts = []
        for number, (operator, columns, weight) in enumerate(self.parts):
            members = [target for target in targets if target.operator == operator]
            recall = partial(_part_of_weight, w, columns)
            parts.append(
                (columns, weight.encode_input(x, key.branch(f"part{number}"), members, empty, recall, tallies))
            )
        return DividedInput(parts)


class DividedInput(EncodedInput):
    """``X`` as each operator gets it."""

    def __init__(self, parts: Sequence[tuple[Tensor, EncodedInput]]) -> None:
        self.parts = parts
        self.operands = [o for columns, part in parts for o in _addressed(part.operands, columns)]

    def secrets(self, worker: int) -> dict[str, Tensor]:
        """The masks of the worker's part, and the output features (``columns``) that it consists of."""
        for columns, part in self.parts:
            if any(operand.worker == worker for operand in part.operands):
                return part.secrets(worker) | {"columns": columns}
        raise KeyError(worker)

    def decode_output(
        self,
        replies: dict[int, Reply],
        sizes: Sequence[int],
        biases: Sequence[Tensor | None] = (),
        added: Sequence[LowRank | None] = (),
    ) -> list[Tensor]:
        """Put each part's columns where they belong."""
        pieces = [part.decode_output(_of(replies, part.operands), [len(columns)])[0] for columns, part in self.parts]
        merged = _merged([columns for columns, _ in self.parts], pieces, 1, sizes)
        add_biases(merged, biases or [None] * len(merged))
        add_all(merged, added)
        return merged

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
        """Each part's columns of ``G`` to the workers that hold it."""
        parts = []
        for number, (columns, source) in enumerate(self.parts):
            recall = partial(_part_of_weight, w, columns)
            branch, mine = key.branch(f"part{number}"), g.index_select(1, columns)
            part = source.encode_gradient(mine, branch, empty, x, recall, want_dw=want_dw, tallies=tallies)
            parts.append((columns, part))
        return DividedGradient(parts)


class DividedGradient(EncodedGradient):
    """``G`` as each operator gets it."""

    def __init__(self, parts: Sequence[tuple[Tensor, EncodedGradient]]) -> None:
        self.parts = parts
        self.operands = [o for columns, part in parts for o in _addressed(part.operands, columns)]

    def decode_input_gradient(self, replies: dict[int, Reply], added: LowRank | None = None) -> Tensor:
        """The sum of the parts'."""
        first, *others = (part.decode_input_gradient(_of(replies, part.operands)) for _, part in self.parts)
        for other in others:
            first += other
        add_all([first], [added])
        return first

    def decode_weight_gradient(self, replies: dict[int, Reply], sizes: Sequence[int]) -> list[Tensor]:
        """Put each part's rows where they belong."""
        pieces = [
            part.decode_weight_gradient(_of(replies, part.operands), [len(columns)])[0] for columns, part in self.parts
        ]
        return _merged([columns for columns, _ in self.parts], pieces, 0, sizes)


def _of(replies: dict[int, Reply], operands: Sequence[Operand]) -> dict[int, Reply]:
    return {operand.worker: replies[operand.worker] for operand in operands}


def _merged(columns: Sequence[Tensor], parts: Sequence[Tensor], axis: int, sizes: Sequence[int]) -> list[Tensor]:
    """Parts, each some ``columns`` along ``axis``, in their order and cut into ``sizes``."""
    order = torch.cat(list(columns)).argsort()
    whole = torch.cat(list(parts), axis)
    return [whole.index_select(axis, which) for which in order.split(list(sizes))]

"""Scheme `split`: additive shares of ``X`` and ``G`` over several operators; the weight is public and frozen.

What goes out is linear in the one secret: ``Y = X Wᵀ`` and ``dX = G W``, with ``W`` integers that everyone may know,
and no ``dW`` at all. Of t + 1 operators t get a seed each, of which their worker expands a share that is uniform mod p;
the last gets what is left. Any t of them see uniform numbers, whatever the rows are: docs/schemes/split.md proves it.

Rows and weight are integers (`fixed_point`, `tempo.wire.integers`), sums are exact, and so is their check
(`tempo.verify.field`): that of the sum of all answers. Answers that are wrong and add up to the right sum do no harm;
where the sum is wrong, every answer is checked against its own share, to name who lied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Final, Self, final

import torch
from torch import Tensor

from tempo.errors import SchemeError, SettingsError, WorkerFailedError
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
    Traits,
)
from tempo.schemes.fixed_point import combine_rows, most_omega, share_rows
from tempo.schemes.low_rank import LowRank
from tempo.schemes.reply import Reply
from tempo.settings import Settings
from tempo.verify.field import VECTORS, row_sums
from tempo.verify.policy import Policy
from tempo.wire.integers import digest, integers
from tempo.wire.messages import Conv, Product, Residues
from tempo.wire.residues import SEED_BYTES, P, expand

_EVERY_CALL: Final = Policy("always")


@final
class Split(Scheme):
    """Shares over ``colluders + 1`` operators.

    Args:
        colluders: How many operators may put together what they see.
        bits: Of the weight's integers.
        policy: Which answers are checked.
    """

    name = "split"
    traits = Traits(
        protects="hides inputs, gradients and trained parameters from any single operator, under AES-CTR as a "
        "pseudo-random generator; the frozen weights are public",
        min_workers=2,
        with_fewer="Scheme 'mix-tuned' makes do with one: it resists attacks that know the base alone, but who has "
        "data like yours, too, learns part of its masks, and so of data and adapters (docs/threat-model.md)",
        distinct_operators=True,
        operators=2,
        public_weights=True,
        exact=True,
        unfolds=True,
    )

    def __init__(self, colluders: int = 1, bits: int = 9, policy: Policy = _EVERY_CALL) -> None:
        self.colluders, self.bits, self.policy = colluders, bits, policy
        if colluders > 1:
            least = colluders + 1
            protects = self.traits.protects.replace("single operator", f"{colluders} operators together")
            self.traits = replace(self.traits, protects=protects, min_workers=least, operators=least)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """As the settings say; in clear, who listens on the way would get all shares."""
        if settings.insecure_no_tls:
            raise SettingsError(
                "scheme 'split' with insecure_no_tls: who listens on the way has all shares, and so everything: use TLS"
            )
        return cls(settings.split_colluders, settings.split_weight_bits, Policy(settings.verify))

    def asks(self, product: Product) -> Product:
        """A product mod p."""
        return Residues()

    def public_digest(self, w: Tensor) -> bytes:
        """Of its integers."""
        return digest(integers(w, self.bits)[0])

    def refuses(self, product: Product, x: tuple[int, ...], w: tuple[int, ...]) -> str | None:
        """Only fully connected layers, and convolutions as patches; and none so large that rows would have few bits."""
        if isinstance(product, Conv) and product.groups > 1:
            return "scheme 'split' sends no convolutions with groups"
        largest = 1 << (self.bits - 1)
        if any(largest * features**0.5 > most_omega(features) for features in (w[0], prod(w[1:]))):
            return f"too many features for weights of {self.bits} bits"
        return None

    def encode_weight(
        self,
        problem: Problem,
        w: Tensor,
        key: Key,
        targets: Sequence[Target],
        empty: Empty,
        tally: TallyOfWeight | None = None,
    ) -> EncodedWeight:
        """Integers, the same ones for all; not in send buffers, since they may not have to be sent."""
        w_q, scales = integers(w, self.bits)
        operands = [Operand(target.worker, {"w": w_q}, slice(0, len(w))) for target in targets]
        return PublicWeight(self, w_q, scales.view(-1), key, operands)


@dataclass(frozen=True, slots=True)
class Side:
    """What one way through a weight needs: forward with its rows as outputs, backward with its columns.

    Attributes:
        omega: The largest norm of the integers that a row is summed with.
        into: Vectors that operands are summed with to check answers, int32 (k, features of the operand).
        out_of: And those for answers, int32 (k, features of the answer).
    """

    omega: float
    into: Tensor
    out_of: Tensor


class PublicWeight(EncodedWeight):
    """The integers of a weight, and what checks products with them."""

    def __init__(self, scheme: Split, w_q: Tensor, scales: Tensor, key: Key, operands: list[Operand]) -> None:
        self.scheme, self.scales, self.operands = scheme, scales, operands
        m, d = w_q.shape
        norms = w_q.double().square_()
        r, v = (_residues(key, name, (VECTORS, size)) for name, size in (("r", m), ("v", d)))
        self.forward = Side(float(norms.sum(1).max().sqrt()), _times(w_q.t(), r), r)
        self.backward = Side(float(norms.sum(0).max().sqrt()), _times(w_q, v), v)

    def encode_input(
        self,
        x: Tensor,
        key: Key,
        targets: Sequence[Target],
        empty: Empty,
        w: Recall,
        tallies: Tallies | None = None,
    ) -> EncodedInput:
        """Shares of ``X``; what is left of it goes to the last worker."""
        if len({target.operator for target in targets}) <= self.scheme.colluders:
            raise SchemeError(
                f"scheme 'split' against {self.scheme.colluders} colluding operators needs {self.scheme.colluders + 1} "
                f"operators; {len(targets)} left: nothing was sent. Connect to more, of other operators"
            )
        workers = [target.worker for target in targets]
        return SharedInput(self, Shares(self.scheme, self.forward, "x", x, None, key, workers, empty))


class Shares:
    """One operand, shared, and what gives the product of it back."""

    def __init__(
        self,
        scheme: Split,
        side: Side,
        name: str,
        rows: Tensor,
        scales: Tensor | None,
        key: Key,
        workers: Sequence[int],
        empty: Empty,
    ) -> None:
        *seeded, last = workers
        self.side, self.last, self.shape, self.dtype = side, last, tuple(rows.shape), rows.dtype
        self.policy = scheme.policy
        self.seeds = {worker: key.stream(f"share{i}").read(SEED_BYTES).tobytes() for i, worker in enumerate(seeded)}
        out = empty(last, self.shape, torch.int32)
        into = side.into if scheme.policy.chooses() else None
        self.steps, self.sums = share_rows(rows, scales, side.omega, list(self.seeds.values()), out, into)
        self.operands = [
            Operand(worker, {"seed": _bytes(seed)}, slice(0, len(rows)), stands_for=self.shape, answers=torch.int32)
            for worker, seed in self.seeds.items()
        ]
        self.operands.append(Operand(last, {name: out}, slice(0, len(rows)), answers=torch.int32))

    def combine(
        self,
        replies: dict[int, Reply],
        scales: Tensor | None,
        sizes: Sequence[int],
        biases: Sequence[Tensor | None] = (),
        added: Sequence[LowRank | None] = (),
    ) -> list[Tensor]:
        """The product, from those of the shares, in pieces of ``sizes`` columns, each plus its bias and what is added.

        Raises:
            WorkerLiedError: It is wrong, and this worker's part of it.
        """
        parts = {worker: replies[worker].checked() for worker in (*self.seeds, self.last)}
        outs = [torch.empty(self.shape[0], size, dtype=self.dtype) for size in sizes]
        out_of = None if self.sums is None else self.side.out_of
        sums = combine_rows(list(parts.values()), self.steps, scales, biases, outs, out_of, added)
        if self.sums is not None and sums is not None and not self.policy.agree(sums, self.sums):
            self._blame(self.sums, parts, replies)
        return outs

    def _blame(self, left: Tensor, parts: dict[int, Tensor], replies: dict[int, Reply]) -> None:
        """Check every answer against its own share; ``left`` are the sums of the whole."""
        for worker, seed in self.seeds.items():
            share = row_sums(expand(seed, torch.empty(self.shape, dtype=torch.int32)), self.side.into)
            self._judge(share, parts[worker], replies[worker])
            left = left - share
        self._judge(left, parts[self.last], replies[self.last])
        raise WorkerFailedError(
            "answers were wrong when they were added up, and right when each was looked into: a worker on this machine "
            "changed its answer while it was read"
        )

    def _judge(self, expected: Tensor, part: Tensor, reply: Reply) -> None:
        wrong = (row_sums(part, self.side.out_of) - expected).remainder_(P).any(1)
        if bool(wrong.any()):
            raise reply.wrong(int(wrong.int().argmax()))


class SharedInput(EncodedInput):
    """Shares of ``X``."""

    def __init__(self, weight: PublicWeight, shares: Shares) -> None:
        self._weight, self._shares = weight, shares
        self.operands = shares.operands

    def secrets(self, worker: int) -> dict[str, Tensor]:
        """None: a worker's share is all that it has, and independent of what it is a share of."""
        return {}

    def decode_output(
        self,
        replies: dict[int, Reply],
        sizes: Sequence[int],
        biases: Sequence[Tensor | None] = (),
        added: Sequence[LowRank | None] = (),
    ) -> list[Tensor]:
        """``Y``, checked."""
        return self._shares.combine(replies, self._weight.scales, sizes, biases, added)

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
        """Shares of ``G``, under a key of its own, so as often as wanted; what is left goes to the first worker.

        Raises:
            SchemeError: The gradient of a weight is wanted.
        """
        if want_dw:
            raise SchemeError("scheme 'split' has no gradients of weights: its weights are frozen")
        workers = [operand.worker for operand in reversed(self.operands)]
        weight = self._weight
        shares = Shares(weight.scheme, weight.backward, "g", g, weight.scales, key, workers, empty)
        return SharedGradient(shares, weight)


class SharedGradient(EncodedGradient):
    """Shares of ``G``."""

    def __init__(self, shares: Shares, weight: PublicWeight) -> None:
        self._shares, self._features = shares, weight.forward.into.shape[1]
        self.operands = shares.operands
        self.finite = bool(torch.isfinite(shares.steps).all())

    def decode_input_gradient(self, replies: dict[int, Reply], added: LowRank | None = None) -> Tensor:
        """``dX``, checked."""
        (dx,) = self._shares.combine(replies, None, [self._features], added=[added])
        return dx

    def decode_weight_gradient(self, replies: dict[int, Reply], sizes: Sequence[int]) -> list[Tensor]:
        """There is none."""
        raise SchemeError("scheme 'split' has no gradients of weights: its weights are frozen")


def _residues(key: Key, name: str, shape: tuple[int, int]) -> Tensor:
    return expand(key.stream(name).read(SEED_BYTES).tobytes(), torch.empty(shape, dtype=torch.int32))


def _times(w_q: Tensor, vectors: Tensor) -> Tensor:
    """``vectors w_qᵀ mod p`` for ``w_q`` (n, m) and vectors (k, m): int32 (k, n)."""
    return row_sums(w_q.int(), vectors).t().to(torch.int32).contiguous()


def _bytes(seed: bytes) -> Tensor:
    return torch.frombuffer(bytearray(seed), dtype=torch.uint8)

"""The contract of a scheme: how operands of a product are encoded for workers, and their answers decoded.

A product is bilinear, ``Y = f(X, W)``, with rows (samples, tokens, pixels) on axis 0 of X and Y, input features on
axis 1 of X and W, output features on axis 1 of Y and axis 0 of W; further axes are spatial. Encoding runs as a chain,
and each link holds the secrets that its own decoding needs::

    Scheme.encode_weight(W)          -> EncodedWeight     stored by the workers until it expires
    EncodedWeight.encode_input(X)    -> EncodedInput      forward;  decode_output(replies)  -> Y
    EncodedInput.encode_gradient(G)  -> EncodedGradient   backward; decode_{input,weight}_gradient(replies) -> dX, dW

Every encoding yields *addressed* operands: which worker gets which tensor, each with its own dtype. So a scheme may
divide rows among workers, send each another share, or add columns and correct for them on the way back. Corrections may
need plain operands again: the engine hands over ways to recall them (`Recall`), so that none is kept for their sake.
Schemes are pure tensor mathematics: no input or output, no randomness but the key schedule's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from tempo.keys import Key
from tempo.schemes.low_rank import LowRank
from tempo.schemes.reply import Reply, Tally
from tempo.settings import Settings
from tempo.wire.messages import Conv, Product, Rule

if TYPE_CHECKING:
    from tempo.schemes.masks import Masks

Empty = Callable[[int, tuple[int, ...], torch.dtype], Tensor]
"""``empty(worker, shape, dtype)``: a send buffer for that worker, to be written once, by the encoding itself."""

Tallies = Mapping[int, Tally]
"""What to sum of ``x`` or ``g`` as each worker gets it, while that is masked; a scheme need not."""

TallyOfWeight = Callable[[int, Tensor], Tally | None]
"""``tally(worker, w)``: what to sum of that worker's ``w~`` while it is masked into ``w``; None: nothing."""

Recall = Callable[[], Tensor]
"""Gives a plain operand again, as it was in the forward pass. Call it before returning; it may not hold later."""


@dataclass(frozen=True, slots=True)
class Target:
    """A worker that takes part in a product: its number in the session, its operator, its share of the rows."""

    worker: int
    operator: str
    share: float


@dataclass(frozen=True, slots=True)
class Operand:
    """Tensors addressed to one worker: ``x``, ``w`` or ``g``, plus whatever a scheme adds.

    ``rows`` of axis 0 they stand for and, where output features are divided too, which ``columns`` (None: all).
    """

    worker: int
    tensors: dict[str, Tensor]
    rows: slice
    columns: Tensor | None = None
    stands_for: tuple[int, ...] | None = None
    """The shape of ``x`` or ``g`` where only a seed of it is sent."""
    answers: torch.dtype | None = None
    """What answers have to be of, where neither the settings nor the operand decide."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of operand ``name``."""
        return self.stands_for or tuple(self.tensors[name].shape)


@dataclass(frozen=True, slots=True)
class Problem:
    """One product as the scheme sees it: its kind, and the dtype its operands travel in."""

    product: Product
    wire_dtype: torch.dtype

    @property
    def groups(self) -> int:
        """Independent groups of channels."""
        return self.product.groups if isinstance(self.product, Conv) else 1


@dataclass(frozen=True, slots=True)
class Traits:
    """What a scheme needs and allows; checked when a session starts, printed by `Session.summary`."""

    protects: str
    min_workers: int = 1
    with_fewer: str = ""
    """What to use with fewer, and what it would give away."""
    distinct_operators: bool = False
    operators: int = 1
    """How many distinct operators a product is divided over, where there are that many."""
    fresh_every_call: bool = False
    """Whether a weight is masked anew for every call, in training, evaluation and prediction."""
    lasting_masks: bool = False
    """Whether masks of features stay as they are when a weight changes. Then updates on workers give nothing more away,
    and ``update="auto"`` may choose them. Where they are drawn anew, updates on workers would keep them for several
    steps, and show what the optimizer keeps besides."""
    public_weights: bool = False
    """Whether weights go out as they are: then only those may that are frozen, and were when they were protected as
    public ones."""
    exact: bool = False
    """Whether the scheme checks answers itself, exactly, and hides what is sent provably."""
    unfolds: bool = False
    """Whether spatial convolutions go out as patches times a matrix (see `tempo.engine.patches`)."""
    public_base_preset: str = ""
    """The scheme to use instead of this one where training starts from a public checkpoint; empty: none is better."""
    known_breaks: Mapping[str, str] = field(default_factory=dict)
    """What is known to undo the scheme, by what makes it apply: ``always``, ``relu``, ``public-base``,
    ``spatial-convolution``, ``momentum-on-workers``; see `tempo.conditions`."""


class EncodedGradient(ABC):
    """The output gradient under masks, and what undoes the masks of ``dX`` and ``dW``."""

    operands: list[Operand]
    finite: bool = True
    """Whether the gradient is, as far as the encoding noticed."""
    total: Tensor | None = None
    """The sum of its rows (m), if encoding it made that on the way."""

    @property
    def corrects_weight_gradient(self) -> bool:
        """Whether ``dW`` has to be corrected, besides being unmasked: then workers cannot use theirs."""
        return True

    @abstractmethod
    def decode_input_gradient(self, replies: dict[int, Reply], added: LowRank | None = None) -> Tensor:
        """``dX`` from the workers' ``dx``, keyed by worker, plus what is ``added``."""

    @abstractmethod
    def decode_weight_gradient(self, replies: dict[int, Reply], sizes: Sequence[int]) -> list[Tensor]:
        """``dW`` from the workers' ``dw``, in pieces of ``sizes`` output features."""


class EncodedInput(ABC):
    """The input under masks, and what undoes the masks of the output."""

    operands: list[Operand]

    @abstractmethod
    def secrets(self, worker: int) -> dict[str, Tensor]:
        """The masks around what ``worker`` got, by name; only for the insecure truth recording that scores audits."""

    @abstractmethod
    def decode_output(
        self,
        replies: dict[int, Reply],
        sizes: Sequence[int],
        biases: Sequence[Tensor | None] = (),
        added: Sequence[LowRank | None] = (),
    ) -> list[Tensor]:
        """``Y`` from the workers' ``y``, keyed by worker.

        Args:
            replies: Their answers.
            sizes: Of pieces of the features.
            biases: What each piece gets besides, one number for each feature, or None; empty: nothing.
            added: And this, or None; empty: nothing.
        """

    @abstractmethod
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
        """Mask ``G`` for the workers that hold this input.

        Args:
            g: The gradient of the output.
            key: Fresh for every call.
            empty: Gives send buffers.
            x: Recalls ``X``.
            w: Recalls ``W``.
            want_dw: Whether `EncodedGradient.decode_weight_gradient` will be called.
            tallies: What to sum of it on the way.

        Raises:
            UnsafeError: A gradient was already encoded with this input: another one would meet the same masks.
        """


class EncodedWeight(ABC):
    """A weight under masks."""

    operands: list[Operand]

    @abstractmethod
    def encode_input(
        self,
        x: Tensor,
        key: Key,
        targets: Sequence[Target],
        empty: Empty,
        w: Recall,
        tallies: Tallies | None = None,
    ) -> EncodedInput:
        """Mask ``X`` for ``targets``, which hold this weight.

        Args:
            x: The input.
            key: Fresh for every call.
            targets: Workers that take part.
            empty: Gives send buffers.
            w: Recalls ``W``.
            tallies: What to sum of it on the way.
        """


class UpdatableWeight(EncodedWeight):
    """A weight under masks that commute with some optimizers, so that a worker may change it: `Scheme.commutes`."""

    masks: Masks

    @abstractmethod
    def encode_kept(self, name: str, plain: Tensor, key: Key, out: Tensor, *, linear: bool) -> None:
        """Mask what an optimizer keeps of the weight, or its gradient so far.

        Args:
            name: ``gradient``, or the name that `torch.optim` has for it.
            plain: What to mask, of the weight's shape and dtype.
            key: Fresh.
            out: Where to write it.
            linear: Whether the optimizer is linear in it.
        """

    @abstractmethod
    def decode_kept(self, name: str, masked: Tensor) -> Tensor:
        """The weight (``w``), its gradient, or what an optimizer keeps of it, from what a worker has by now."""

    @abstractmethod
    def keeps_length(self, name: str) -> bool:
        """Whether what a worker has under ``name`` is as long as what it stands for."""

    @abstractmethod
    def discard(self) -> None:
        """Note that the worker dropped the gradient."""

    @abstractmethod
    def follow(self, rule: Rule, scale: float) -> None:
        """Note that a worker changed the weight by ``rule``, its gradient times ``scale``."""


class Scheme(ABC):
    """A way to hide operands from workers. One file and one registry line each."""

    name: ClassVar[str]
    traits: Traits

    @property
    def commutes(self) -> Literal["with any", "with rotations", "not"]:
        """With which optimizers the masks of features commute, so that a worker may run them on a masked weight.

        ``with any``: signed permutations, which no element-wise arithmetic notices; ``with rotations``: orthogonal
        ones; ``not``: others, and masks that are fresh at every call.
        """
        return "not"

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The scheme as a session's settings ask for it."""
        return cls()

    def asks(self, product: Product) -> Product:
        """What workers are asked to compute for ``product``."""
        return product

    def public_digest(self, w: Tensor) -> bytes:
        """By what workers know a public weight (m, d); only of schemes with ``public_weights``."""
        raise NotImplementedError(f"scheme {self.name!r} hides weights")

    def refuses(self, product: Product, x: tuple[int, ...], w: tuple[int, ...]) -> str | None:
        """Why a product of operands of these shapes must stay in the trusted process, or None."""
        return None

    def rows_sent(self, rows: int) -> int:
        """How many rows a worker gets where ``rows`` are its part: some schemes add more."""
        return rows

    def may_part(self, rows: int, parts: int) -> bool:
        """Whether ``rows`` that go to a worker in so many ``parts``, one by one, are masked as well as the whole."""
        return rows >= parts and self.rows_sent(rows // parts) == rows // parts

    def rows_to_repeat(self, g: Tensor, x: tuple[int, ...], w: tuple[int, ...], *, want_dw: bool) -> Tensor | None:
        """Rows of a call to send again by themselves, under fresh masks, for the gradient ``g`` that is zero elsewhere.

        Args:
            g: The gradient of the output.
            x: Shape of the input.
            w: Shape of the weight.
            want_dw: Whether the weight's gradient is wanted, and so ``X`` needed again.

        Returns:
            Row numbers, ascending, all live rows of ``g`` among them; or None to send ``g`` as it is.
        """
        return None

    @abstractmethod
    def encode_weight(
        self,
        problem: Problem,
        w: Tensor,
        key: Key,
        targets: Sequence[Target],
        empty: Empty,
        tally: TallyOfWeight | None = None,
    ) -> EncodedWeight:
        """Mask ``W`` for ``targets``. ``key`` is fresh whenever the weight changed or its mask expired.

        A scheme need not sum what ``tally`` asks for.
        """

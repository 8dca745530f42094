"""The contract of a scheme: how operands of a product are encoded for workers, and their answers decoded.

A product is bilinear, ``Y = f(X, W)``, with rows (samples, tokens, pixels) on axis 0 of X and Y, input features on
axis 1 of X and W, output features on axis 1 of Y and axis 0 of W; further axes are spatial. Encoding runs as a chain,
and each link holds the secrets that its own decoding needs::

    Scheme.encode_weight(W)          -> EncodedWeight     stored by the workers until it expires
    EncodedWeight.encode_input(X)    -> EncodedInput      forward;  decode_output(replies)  -> Y
    EncodedInput.encode_gradient(G)  -> EncodedGradient   backward; decode_{input,weight}_gradient(replies) -> dX, dW

Every encoding yields *addressed* operands: which worker gets which tensor, each with its own dtype. So a scheme may
divide rows among workers, send each another share, or add columns and correct for them on the way back.
Schemes are pure tensor mathematics: no input or output, no randomness but the key schedule's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from tempo.keys import Key
from tempo.settings import Settings
from tempo.wire.messages import Conv, Product

Empty = Callable[[int, tuple[int, ...], torch.dtype], Tensor]
"""``empty(worker, shape, dtype)``: a send buffer for that worker, to be written once, by the encoding itself."""


@dataclass(frozen=True, slots=True)
class Target:
    """A worker that takes part in a product: its number in the session, its operator, its share of the rows."""

    worker: int
    operator: str
    share: float


@dataclass(frozen=True, slots=True)
class Operand:
    """Tensors addressed to one worker: ``x``, ``w`` or ``g``, plus whatever a scheme adds, for rows of axis 0."""

    worker: int
    tensors: dict[str, Tensor]
    rows: slice


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
    distinct_operators: bool = False
    updates: tuple[str, ...] = ("trusted",)
    optimizers: tuple[str, ...] = ("any",)
    mask_seconds_per_element: float = 1.5e-9
    """Masking or unmasking one element in pure torch on one core, measured on Zen 4 (see benchmarks/)."""
    public_base_preset: str = ""
    """The scheme that stands in for this one where weights come from a public base; empty: itself."""
    known_breaks: Mapping[str, str] = field(default_factory=dict)
    """What is known to undo the scheme, by what makes it apply: ``always``, ``relu``, ``public-base``,
    ``zero-gradient-rows``."""


class EncodedGradient(ABC):
    """The output gradient under masks, and what undoes the masks of ``dX`` and ``dW``."""

    operands: list[Operand]

    @abstractmethod
    def decode_input_gradient(self, replies: dict[int, Tensor]) -> Tensor:
        """``dX`` from the workers' ``dx``, keyed by worker."""

    @abstractmethod
    def decode_weight_gradient(self, replies: dict[int, Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """``dW`` from the workers' ``dw``, in pieces of ``sizes`` output features."""


class EncodedInput(ABC):
    """The input under masks, and what undoes the masks of the output."""

    operands: list[Operand]

    @abstractmethod
    def secrets(self, worker: int) -> dict[str, Tensor]:
        """The masks around what ``worker`` got, by name; only for the insecure truth recording that scores audits."""

    @abstractmethod
    def decode_output(self, replies: dict[int, Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """``Y`` from the workers' ``y``, keyed by worker, in pieces of ``sizes`` output features."""

    @abstractmethod
    def encode_gradient(self, g: Tensor, key: Key, empty: Empty) -> EncodedGradient:
        """Mask ``G`` for the workers that hold this input.

        Raises:
            UnsafeError: A gradient was already encoded with this input: another one would meet the same masks.
        """


class EncodedWeight(ABC):
    """A weight under masks."""

    operands: list[Operand]

    @abstractmethod
    def encode_input(self, x: Tensor, key: Key, targets: Sequence[Target], empty: Empty) -> EncodedInput:
        """Mask ``X`` for ``targets``, all of which hold this weight. ``key`` is fresh for every call."""


class Scheme(ABC):
    """A way to hide operands from workers. One file and one registry line each."""

    name: ClassVar[str]
    traits: ClassVar[Traits]

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The scheme as a session's settings ask for it."""
        return cls()

    @property
    def mask_seconds_per_element(self) -> float:
        """What masking or unmasking one element costs, for the planner."""
        return self.traits.mask_seconds_per_element

    def rows_sent(self, rows: int) -> int:
        """Rows that workers get in all where a product has ``rows``, for the planner."""
        return rows

    def refuses(self, product: Product, x: tuple[int, ...], w: tuple[int, ...]) -> str | None:
        """Why a product of operands of these shapes must stay in the trusted process, or None."""
        return None

    @abstractmethod
    def encode_weight(
        self, problem: Problem, w: Tensor, key: Key, targets: Sequence[Target], empty: Empty
    ) -> EncodedWeight:
        """Mask ``W`` for ``targets``. ``key`` is fresh whenever the weight changed or its mask expired."""

"""What checks go by: sums of what is sent, and answers as a scheme decodes them.

A worker may change what it sent for as long as it lies in shared memory, so there is no way to it but these: a copy
that was checked, or one reading that is checked by what it saw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final, Protocol, Self, final

import torch
from torch import Tensor

from tempo.errors import WorkerLiedError

MOST_WATCHED: Final = 16
"""Vectors that rows can be summed with on the way."""

MOST_WEIGHTS: Final = 8
"""And columns."""


@dataclass(slots=True)
class Watch:
    """Sums of the rows of a matrix (T, d), or of maps' pixels, made by what reads it, of what it read.

    Attributes:
        vectors: What rows are summed with, (k, d), float32.
        sums: (k, T), float32.
        lengths: Of the rows (T), float64.
        seen: Whether sums and lengths were made; if not, the matrix has to be read in another way.
    """

    vectors: Tensor
    sums: Tensor
    lengths: Tensor
    seen: bool = False

    @classmethod
    def of(cls, vectors: Tensor, rows: int) -> Self:
        """Of a matrix of ``rows`` rows."""
        return cls(vectors, vectors.new_empty(len(vectors), rows), vectors.new_empty(rows, dtype=torch.float64))


@dataclass(slots=True)
class Tally:
    """Sums of a masked matrix (T, d), or of maps' pixels, made by what writes it: for who checks what becomes of it.

    Attributes:
        vectors: What to sum rows with, (k, d), float32.
        weights: What to sum columns with, (k', T), float32; None: nothing is wanted of them.
        rows: Sums (k, T) and lengths (T) of the rows; None until they were made, which not all that writes can.
        columns: Sums (k', d) and lengths (d) of the columns.
    """

    vectors: Tensor
    weights: Tensor | None = None
    rows: Watch | None = None
    columns: tuple[Tensor, Tensor] | None = None


class Unmask(Protocol):
    """Reads a masked answer once, and has ``watch``, if there is one, watch."""

    def __call__(self, masked: Tensor, /, *, watch: Watch | None) -> None:
        """``watch`` as `tempo.schemes.sandwich.sandwich` takes it."""


class Reply(ABC):
    """One worker's answer to one product, to be decoded once: by `read` or by `checked`."""

    shape: torch.Size

    @abstractmethod
    def checked(self) -> Tensor:
        """The answer, checked, where its worker cannot change it.

        Raises:
            WorkerLiedError: It is wrong.
        """

    @abstractmethod
    def wrong(self, row: int) -> WorkerLiedError:
        """The error that says that this answer is wrong in ``row``, to be raised where a scheme checks it itself."""

    @abstractmethod
    def read(self, unmask: Unmask) -> None:
        """Have ``unmask`` read the answer; it may be called twice.

        Raises:
            WorkerLiedError: The answer was wrong: what was made of it must not be used.
        """


@final
class Passed(Reply):
    """An answer that needs no check."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self._tensor = tensor

    def checked(self) -> Tensor:
        """The answer."""
        return self._tensor

    def wrong(self, row: int) -> WorkerLiedError:
        """There is no worker to name."""
        return WorkerLiedError(f"an answer of shape {tuple(self.shape)} is wrong in row {row}")

    def read(self, unmask: Unmask) -> None:
        """Once."""
        unmask(self._tensor, watch=None)

"""Public checkpoints that a worker loaded itself: weights as integers, by digest, so that they need not travel.

Only digests are kept. Integers are made from the files again when a session asks for them; that takes as long as
reading them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tempo.errors import SettingsError
from tempo.wire.integers import digest, integers
from tempo.wire.memory import BlockPool
from tempo.worker.compute import Incoming
from tempo.worker.refusal import Refusal

BITS: Final = (9, 8)
"""Of integers that are offered unless others are asked for."""

_FLOATS: Final = ("F64", "F32", "F16", "BF16")

log = logging.getLogger("tempo.worker")


@final
@dataclass(frozen=True, slots=True)
class Source:
    """Where the integers of a weight come from, and what they are."""

    path: Path
    name: str
    transposed: bool
    bits: int
    rows: slice
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The integers, from the file as it is now. Raises SafetensorError or OSError."""
        with safe_open(self.path, framework="pt") as file:
            return integers(_oriented(file.get_tensor(self.name), self.transposed), self.bits)[0][self.rows]


@final
class Base:
    """Weights of the safetensors files in some folders.

    Args:
        folders: Of checkpoints.
        bits: Of the integers that are offered.

    Raises:
        SettingsError: There is no such file, or one cannot be read; names it.
    """

    def __init__(self, folders: Sequence[Path] = (), bits: Sequence[int] = BITS) -> None:
        self._sources: dict[bytes, Source] = {}
        for folder in folders:
            paths = sorted(folder.glob("*.safetensors"))
            if not paths:
                raise SettingsError(f"--base {folder}: no *.safetensors there; name the folder of a checkpoint")
            for path in paths:
                self._sources.update(_index(path, bits))
            log.info("base %s: %d weights as integers of %s bits", folder, len(self._sources), list(bits))

    def take(self, digests: Sequence[bytes], pool: BlockPool) -> Incoming:
        """One weight, made of those with these digests, one below the other.

        Args:
            digests: Of integers, as `tempo.wire.integers.digest`.
            pool: Gives memory for it.

        Raises:
            Refusal: One of them is not here, they do not fit together, or there is no memory.
        """
        sources = [self.find(key) for key in digests]
        first = sources[0]
        if any((source.shape[1:], source.dtype) != (first.shape[1:], first.dtype) for source in sources):
            raise Refusal("bad-request", "weights of different widths or dtypes are no weight together")
        shape = sum(source.shape[0] for source in sources), first.shape[1]
        block = pool.take(shape[0] * shape[1] * first.dtype.itemsize)
        whole = block.tensor(shape, first.dtype)
        try:
            rows = whole.split([source.shape[0] for source in sources])
            for key, source, part in zip(digests, sources, rows, strict=True):
                part.copy_(self._read(key, source))
        except BaseException:
            pool.give(block)
            raise
        return Incoming(whole, block)

    def find(self, key: bytes) -> Source:
        """Where integers with this digest come from, or `Refusal`."""
        if key not in self._sources:
            raise Refusal("unknown-digest", "not among the weights of this worker's --base")
        return self._sources[key]

    def _read(self, key: bytes, source: Source) -> Tensor:
        try:
            found = source.read()
            if digest(found) == key:
                return found
            why = "it changed since this worker started"
        except (SafetensorError, OSError, ValueError) as error:
            why = str(error)
        log.warning("%s: %s", source.path, why)
        self._sources.pop(key, None)
        raise Refusal("unknown-digest", "this worker's --base is not what it was")


def _index(path: Path, bits: Sequence[int]) -> Iterator[tuple[bytes, Source]]:
    """Every matrix in a file, as it is and transposed, one at a time in memory."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                header = file.get_slice(name)
                sizes = header.get_shape()
                if len(sizes) < 2 or 0 in sizes or header.get_dtype() not in _FLOATS:
                    continue
                w = file.get_tensor(name)
                for transposed in (False, True) if len(sizes) == 2 else (False,):
                    for count in bits:
                        w_q, _ = integers(_oriented(w, transposed), count)
                        for rows in _parts(len(w_q), w_q.shape[1]):
                            part = w_q[rows]
                            yield (
                                digest(part),
                                Source(path, name, transposed, count, rows, tuple(part.shape), part.dtype),
                            )
    except (SafetensorError, OSError) as error:
        raise SettingsError(f"--base: {path} cannot be read as safetensors: {error}; download it again") from None


def _parts(rows: int, features: int) -> list[slice]:
    """The whole; and of query, key and value in one, as in `nn.MultiheadAttention`, each, and the last two."""
    whole, packed = slice(0, rows), rows == 3 * features
    return [whole, *(slice(features * a, features * b) for a, b in ((0, 1), (1, 2), (2, 3), (1, 3)) if packed)]


def _oriented(w: Tensor, transposed: bool) -> Tensor:
    """A weight with output features first, kernels flat; Hugging Face's `Conv1D` stores it ``transposed``."""
    return w.t().contiguous() if transposed else w.flatten(1)

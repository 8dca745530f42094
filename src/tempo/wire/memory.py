"""Blocks of memory that are used again and again, so that steady state allocates nothing."""

from __future__ import annotations

import mmap
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import final

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64

LARGE_PAGE = 2 << 20
"""Bytes of a large page."""

Memory = mmap.mmap | np.ndarray
"""A writable stretch of memory: pages of our own, shared or not; or (bytes of) what a device has pinned."""


@lru_cache(1024)
def rounded(size: int) -> int:
    """Round up to one of four sizes per power of two, so that similar requests share blocks."""
    step = 1 << max(6, size.bit_length() - 3)
    return max(-(-size // step) * step, ALIGNMENT)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """``size`` bytes at ``offset`` of some mapped memory; ``segment`` is its number where it is shared, else -1.

    The mapping is never closed, only dropped: tensors on top of it keep it alive.
    """

    memory: Memory
    size: int
    segment: int = -1
    offset: int = 0

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor over the start of the block."""
        return tensor_at(self.memory, self.offset, shape, dtype)


def tensor_at(memory: Memory, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor over ``memory`` from ``offset`` on."""
    count = prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


class BlockPool(ABC):
    """Hands out blocks and takes them back; grows only when no free block fits. Safe to use from several threads."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Block]] = defaultdict(list)
        self._lock = threading.Lock()

    @final
    def take(self, size: int) -> Block:
        """A block of at least ``size`` bytes, aligned; its content is whatever it was."""
        size = rounded(size)
        with self._lock:
            fit = size
            while fit <= 2 * size:  # a somewhat larger block beats growing
                if free := self._free.get(fit):
                    return free.pop()
                fit = rounded(fit + 1)
        return self._grow(size)

    @final
    def give(self, block: Block) -> None:
        """Take ``block`` back; the giver must not touch it any more."""
        with self._lock:
            self._free[block.size].append(block)

    @abstractmethod
    def _grow(self, size: int) -> Block: ...


def nothing(_: int) -> None:
    """Charge nobody."""


def mapping(size: int) -> mmap.mmap:
    """Fresh pages of this process's own, large ones if they are to be had."""
    return in_large_pages(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def in_large_pages(memory: mmap.mmap) -> mmap.mmap:
    """``memory``, which nobody has touched yet, in pages of 2 MiB where the kernel has them."""
    with suppress(AttributeError, OSError):  # no such pages on this system
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


@final
class PrivatePool(BlockPool):
    """Blocks of this process's own memory, each one charged to ``reserve`` until `trim` lets it go.

    Args:
        reserve: Called with the size of what is about to be allocated; may raise.
        release: Called with the size of what was let go.
        allocate: Gives memory; raises OSError, ValueError or RuntimeError.
    """

    def __init__(
        self,
        reserve: Callable[[int], None] = nothing,
        release: Callable[[int], None] = nothing,
        allocate: Callable[[int], Memory] = mapping,
    ) -> None:
        super().__init__()
        self._reserve, self._release, self._allocate = reserve, release, allocate

    def _grow(self, size: int) -> Block:
        self._reserve(size)
        try:
            memory = self._allocate(size)
        except (OSError, ValueError, RuntimeError) as error:
            self._release(size)
            raise MemoryError(f"{size} bytes could not be allocated") from error
        return Block(memory, size)

    @property
    def spare(self) -> int:
        """Bytes of the free blocks."""
        with self._lock:
            return sum(size * len(blocks) for size, blocks in self._free.items())

    def trim(self) -> None:
        """Return all free blocks to the operating system."""
        with self._lock:
            freed = sum(size * len(blocks) for size, blocks in self._free.items())
            self._free.clear()
        self._release(freed)

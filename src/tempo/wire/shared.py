"""Shared memory between two processes of one host: nameless, sealed segments that travel as file descriptors.

The trusted side creates every segment and decides where each tensor lies, its own and the answers; the worker only
maps, after checking. Nothing is left behind when either side is killed, since a memfd has no name.

A worker can write to all of a segment at any time. Whoever must not be fooled reads a reply once, or copies it first.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from dataclasses import dataclass
from typing import final

from torch import Tensor

from tempo.errors import ProtocolError
from tempo.wire.memory import Block, BlockPool, tensor_at
from tempo.wire.messages import TensorRef
from tempo.wire.tensors import DTYPES

SEGMENT = 64 << 20
"""Least size of a new segment."""

SEGMENT_LIMIT = 4096
"""Most segments of one connection."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@final
@dataclass(frozen=True, slots=True)
class NewSegment:
    """A segment that the worker has not been told about. Whoever announces it closes ``fd``."""

    number: int
    size: int
    fd: int


@final
class Segments:
    """Creates the segments of one connection (trusted side)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sizes: list[int] = []
        self._new: list[NewSegment] = []

    def create(self, size: int) -> tuple[int, mmap.mmap]:
        """Create and map a segment; `drain` hands out its descriptor for the worker."""
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.memfd_create("tempo", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            raise
        with self._lock:
            number = len(self._sizes)
            self._sizes.append(size)
            self._new.append(NewSegment(number, size, fd))
        return number, memory

    def size(self, number: int) -> int:
        """Bytes of segment ``number``; 0 if there is none."""
        return self._sizes[number] if number < len(self._sizes) else 0

    def drain(self) -> list[NewSegment]:
        """Segments created since the last call, in order."""
        if not self._new:
            return []
        with self._lock:
            new, self._new = self._new, []
        return new

    def close(self) -> None:
        """Close descriptors that were never announced."""
        for segment in self.drain():
            os.close(segment.fd)


@final
class SharedPool(BlockPool):
    """Blocks of shared memory, cut from segments."""

    def __init__(self, segments: Segments) -> None:
        super().__init__()
        self._segments = segments
        self._growth = threading.Lock()
        self._memory: mmap.mmap | None = None
        self._number, self._used, self._size = -1, 0, 0

    def _grow(self, size: int) -> Block:
        with self._growth:
            if self._memory is None or self._used + size > self._size:
                # What is left of the old segment was never touched, so it costs no memory.
                self._number, self._memory = self._segments.create(max(SEGMENT, size))
                self._used, self._size = 0, len(self._memory)
            block = Block(self._memory, size, self._number, self._used)
            self._used += size
            return block


@final
class MappedSegments:
    """The segments that the other side announced (worker side)."""

    def __init__(self) -> None:
        self._memory: list[mmap.mmap] = []

    def size(self, number: int) -> int:
        """Bytes of segment ``number``; 0 if it was never announced."""
        return len(self._memory[number]) if number < len(self._memory) else 0

    def accept(self, number: int, size: int, fd: int) -> None:
        """Check and map an announced segment, and close ``fd``.

        Raises:
            ProtocolError: Not the next number, not a sealed memfd, or not of the announced size.
        """
        try:
            if number != len(self._memory) or number >= SEGMENT_LIMIT:
                raise ProtocolError(f"segment {number} announced where {len(self._memory)} was due")
            try:
                sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            except OSError:
                sealed = 0
            if not sealed:  # else it could be truncated under us, and reading it would kill this process
                raise ProtocolError(f"segment {number} is not a memfd sealed against shrinking")
            if not 0 < size == os.fstat(fd).st_size:
                raise ProtocolError(f"segment {number} is {os.fstat(fd).st_size} bytes, announced as {size}")
            try:
                self._memory.append(mmap.mmap(fd, size))
            except (OSError, ValueError) as error:
                raise ProtocolError(f"segment {number} cannot be mapped: {error}") from error
        finally:
            os.close(fd)

    def tensor(self, ref: TensorRef) -> Tensor:
        """The tensor that a checked reference points to."""
        return tensor_at(self._memory[ref.segment], ref.offset, ref.shape, DTYPES[ref.dtype])

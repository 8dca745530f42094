"""Shared memory between two processes of one host: nameless, sealed segments that travel as file descriptors.

The trusted side creates every segment and decides where each tensor lies, its own and the answers; the worker only
maps, after checking. Nothing is left behind when either side is killed, since a memfd has no name.

Segments for what this side sends are sealed against writing by anyone else: what was masked, and what checks were made
of, stays what it was. Segments for answers cannot be: a worker can write to all of them at any time, so whoever must
not be fooled reads an answer once, or copies it first (`tempo.engine.buffers.Buffers.private`).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import warnings
from dataclasses import dataclass
from typing import final

from torch import Tensor

from tempo.errors import ProtocolError
from tempo.wire.memory import LARGE_PAGE, Block, BlockPool, in_large_pages, tensor_at
from tempo.wire.messages import TensorRef
from tempo.wire.tensors import layout_of

SEGMENT = 64 << 20
"""Least size of a new segment."""

SEGMENT_LIMIT = 4096
"""Most segments of one connection."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_SEAL_FUTURE_WRITE = 0x10
"""Of Linux 5.1; in Python's `fcntl` from 3.13 on. Mappings made before it stay writable, later ones cannot be."""


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

    def create(self, size: int, *, answers: bool) -> tuple[int, mmap.mmap]:
        """Create and map a segment; the worker, which `drain` lets see it, may write to it if ``answers``."""
        size = -(-size // LARGE_PAGE) * LARGE_PAGE
        fd = os.memfd_create("tempo", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = in_large_pages(mmap.mmap(fd, size))
            if not answers:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE)
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
    """Blocks of shared memory, cut from segments: for what is sent, or for ``answers``."""

    def __init__(self, segments: Segments, *, answers: bool) -> None:
        super().__init__()
        self._segments = segments
        self._answers = answers
        self._growth = threading.Lock()
        self._memory: mmap.mmap | None = None
        self._number, self._used, self._size = -1, 0, 0

    def _grow(self, size: int) -> Block:
        with self._growth:
            if self._memory is None or self._used + size > self._size:
                # What is left of the old segment was never touched, so it costs no memory.
                self._number, self._memory = self._segments.create(max(SEGMENT, size), answers=self._answers)
                self._used, self._size = 0, len(self._memory)
            block = Block(self._memory, size, self._number, self._used)
            self._used += size
            return block


@final
class MappedSegments:
    """The segments that the other side announced (worker side)."""

    def __init__(self) -> None:
        self._memory: list[mmap.mmap] = []
        self._writable: list[bool] = []

    def writable(self, number: int) -> bool:
        """Whether segment ``number`` is one for answers; writing to another would kill this process."""
        return number < len(self._writable) and self._writable[number]

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
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            except OSError:
                seals = 0
            if not seals & fcntl.F_SEAL_SHRINK:  # else it could be truncated under us, and reading it would kill us
                raise ProtocolError(f"segment {number} is not a memfd sealed against shrinking")
            if not 0 < size == os.fstat(fd).st_size:
                raise ProtocolError(f"segment {number} is {os.fstat(fd).st_size} bytes, announced as {size}")
            writable = not seals & (_SEAL_FUTURE_WRITE | fcntl.F_SEAL_WRITE)
            if not writable:  # PyTorch's remark on tensors over such memory; ours are only read
                warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            try:
                memory = mmap.mmap(fd, size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
                self._memory.append(in_large_pages(memory))
                self._writable.append(writable)
            except (OSError, ValueError) as error:
                raise ProtocolError(f"segment {number} cannot be mapped: {error}") from error
        finally:
            os.close(fd)

    def tensor(self, ref: TensorRef) -> Tensor:
        """The tensor that a checked reference points to."""
        return tensor_at(self._memory[ref.segment], ref.offset, *layout_of(ref))

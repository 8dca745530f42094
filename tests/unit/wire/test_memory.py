"""Memory that is used again: steady state takes nothing new; what is shared is checked before it is mapped."""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo.errors import ProtocolError
from tempo.wire.memory import ALIGNMENT, Block, BlockPool, PrivatePool, rounded
from tempo.wire.messages import TensorRef
from tempo.wire.shared import SEGMENT, MappedSegments, Segments, SharedPool

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.fixture
def segments() -> object:
    made = Segments()
    yield made
    made.close()


@given(st.integers(0, 1 << 50))
def test_rounding_wastes_at_most_a_quarter(size: int) -> None:
    assert size <= rounded(size) <= max(size * 5 // 4 + ALIGNMENT, ALIGNMENT)
    assert rounded(rounded(size)) == rounded(size)
    assert rounded(size) % ALIGNMENT == 0


@given(st.lists(st.integers(0, 1 << 14), max_size=30))
def test_blocks_in_use_never_overlap(sizes: list[int]) -> None:
    made = Segments()
    pool = SharedPool(made, answers=True)
    blocks = [pool.take(size) for size in sizes]
    ranges = sorted((block.segment, block.offset, block.offset + block.size) for block in blocks)
    for (segment, _, end), (other, start, _) in itertools.pairwise(ranges):
        assert segment != other or end <= start
    assert all(block.size >= size and block.offset % ALIGNMENT == 0 for block, size in zip(blocks, sizes))
    made.close()


@pytest.mark.parametrize("make", [PrivatePool, lambda: SharedPool(Segments(), answers=False)])
def test_steady_state_takes_nothing_new(make: Callable[[], BlockPool]) -> None:
    pool, sizes = make(), [100, 5000, 70_000, 100]

    def step() -> set[Block]:
        blocks = [pool.take(size) for size in sizes]
        for block in blocks:
            pool.give(block)
        return set(blocks)

    first = step()
    assert all(step() <= first for _ in range(5))


def test_a_large_tensor_gets_a_segment_of_its_own(segments: Segments) -> None:
    pool = SharedPool(segments, answers=True)
    small, large = pool.take(64), pool.take(SEGMENT + 1)
    assert len({small.segment, large.segment}) == 2
    new = segments.drain()
    assert [segment.number for segment in new] == list(range(len(new)))
    for segment in new:
        os.close(segment.fd)


def test_both_sides_see_the_same_memory(segments: Segments) -> None:
    block = SharedPool(segments, answers=True).take(1 << 12)
    (new,) = segments.drain()
    mapped = MappedSegments()
    mapped.accept(new.number, new.size, new.fd)
    ours = block.tensor((3, 5), torch.bfloat16)
    theirs = mapped.tensor(TensorRef("x", "bfloat16", (3, 5), block.segment, block.offset))
    ours.copy_(torch.randn(3, 5))
    assert torch.equal(ours, theirs)


def test_what_was_sent_cannot_be_changed_by_the_other_side(segments: Segments) -> None:
    block = SharedPool(segments, answers=False).take(1 << 12)
    (new,) = segments.drain()
    mapped, fd = MappedSegments(), os.dup(new.fd)
    try:
        mapped.accept(new.number, new.size, new.fd)
        assert not mapped.writable(0)
        ours = block.tensor((64,), torch.float32)
        ours.copy_(torch.arange(64.0))  # still ours to write
        assert torch.equal(mapped.tensor(TensorRef("x", "float32", (64,), block.segment, block.offset)), ours)
        with pytest.raises(PermissionError):  # the descriptor is all that a worker has, whatever code it runs
            mmap.mmap(fd, new.size)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
    finally:
        os.close(fd)


def test_an_answer_s_segment_can_be_written(segments: Segments) -> None:
    SharedPool(segments, answers=True).take(1 << 12)
    (new,) = segments.drain()
    mapped = MappedSegments()
    mapped.accept(new.number, new.size, new.fd)
    assert mapped.writable(0)
    assert not mapped.writable(1)


def memfd(size: int, seals: int = SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize(
    ("number", "size", "make", "why"),
    [
        (1, 4096, lambda: memfd(4096), "0 was due"),
        (0, 4096, lambda: memfd(4096, 0), "sealed"),
        (0, 4096, lambda: memfd(4096, fcntl.F_SEAL_GROW), "sealed"),
        (0, 8192, lambda: memfd(4096), "announced as 8192"),
        (0, 0, lambda: memfd(0), "announced as 0"),
        (0, 4096, lambda: os.open("/dev/zero", os.O_RDWR), "sealed"),
    ],
)
def test_a_segment_that_could_be_pulled_away_is_refused(
    number: int, size: int, make: Callable[[], int], why: str
) -> None:
    fd, mapped = make(), MappedSegments()
    with pytest.raises(ProtocolError, match=why):
        mapped.accept(number, size, fd)
    assert mapped.size(0) == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)  # closed, whatever happened

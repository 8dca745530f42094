"""Keeps the C allocator from giving memory back to the kernel between steps, and has it in pages of 2 MiB.

Every tensor above 128 KiB is otherwise a fresh mapping, and touching it for the first time costs a page fault per
4 KiB, which can take longer than the layers that stay trusted compute (and faults cost more inside a TEE). In a virtual
machine, addresses are translated twice, which pages of 2 MiB make cheaper (docs/decisions/0010).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tempo.wire.memory import LARGE_PAGE

# From malloc.h of the GNU C library; the advice from Linux 5.14 and 6.1 on.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MADV_POPULATE_WRITE, _MADV_COLLAPSE = 23, 25

_LEAST: Final = 1 << 28
"""Bytes by which the heap is to grow at least."""

_OVERCOMMIT: Final = Path("/proc/sys/vm/overcommit_memory")


@cache
def keep_heap() -> bool:
    """Let the process keep freed memory for reuse, in large pages; True if the allocator is one that can be told so.

    The heap grows once, by half of the machine's memory: only what is mapped can be put on large pages. None of it is
    in use before it is touched.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    mallopt = getattr(library, "mallopt", None)
    if mallopt is None:
        return False  # another C library, or another allocator preloaded
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 1 << 26))
    accepted = [mallopt(option, value) == 1 for option, value in settings]  # all of them, whatever the first says
    if all(accepted):
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        while size >= _LEAST and not _grow(library, size):
            size //= 2
        for start, end in _heap():
            _advise(start, end - start, mmap.MADV_HUGEPAGE)
    return all(accepted)


def touch_heap() -> None:
    """Have the kernel back twice as much of the kept heap as the process has in memory, where that much is there.

    For benchmarks, after the first steps: where the allocations of several models take turns, they go on meeting
    untouched pages for a long time, which the steps of one do not.
    """
    if not sys.platform.startswith("linux"):
        return
    page = os.sysconf("SC_PAGE_SIZE")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
    left = min(2 * resident, resident + os.sysconf("SC_AVPHYS_PAGES") * page // 2)
    for start, end in _heap():
        size = min(end - start, left)
        _advise(start, size, _MADV_POPULATE_WRITE)
        left -= size


def onto_large_pages(tensor: Tensor) -> None:
    """Move what ``tensor`` lies on to large pages where the kernel can; its address stays, and so do its values."""
    if not sys.platform.startswith("linux") or tensor.layout != torch.strided:
        return
    if tensor.device.type == "cpu" and tensor.nbytes >= 2 * LARGE_PAGE and tensor.is_contiguous():
        start, size = tensor.data_ptr(), tensor.nbytes
        aligned = -(-start // LARGE_PAGE) * LARGE_PAGE
        size = (start + size - aligned) // LARGE_PAGE * LARGE_PAGE
        _advise(aligned, size, mmap.MADV_HUGEPAGE)
        _advise(aligned, size, _MADV_COLLAPSE)


def _advise(start: int, size: int, advice: int) -> None:
    """`madvise`; a kernel that knows no large pages says so, and all goes on as before."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    madvise(start, size, advice)


def _grow(library: ctypes.CDLL, size: int) -> bool:
    if _OVERCOMMIT.is_file() and _OVERCOMMIT.read_text().strip() == "2":
        return False  # what is mapped counts as used, and others would go without
    malloc, free = library.malloc, library.free
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    free.restype, free.argtypes = None, [ctypes.c_void_p]
    block = malloc(size)
    free(block)
    return block is not None


def _heap() -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if line.endswith("[heap]")]
    return [(int(start, 16), int(end, 16)) for start, end in ends]

"""Keeps the C allocator from giving large blocks back to the kernel between steps.

Every tensor above 128 KiB is otherwise a fresh mapping, and touching it for the first time costs a page fault per
4 KiB, which can take longer than the layers that stay trusted compute (and faults cost more inside a TEE).
"""

from __future__ import annotations

import ctypes
import sys

# From malloc.h of the GNU C library.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_heap() -> bool:
    """Let the process keep freed memory for reuse; True if the allocator is one that can be told so."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False  # another C library, or another allocator preloaded
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 1 << 26))
    accepted = [mallopt(option, value) == 1 for option, value in settings]  # all of them, whatever the first says
    return all(accepted)

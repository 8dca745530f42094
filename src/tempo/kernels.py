"""Native kernels, if this installation has them: where they are not, or cannot do what is asked, PyTorch does it.

``TEMPO_KERNELS`` in the environment chooses: ``torch`` for none, or one of `available` instead of the best.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Final

import torch

from tempo.errors import SettingsError

try:
    from tempo import _kernels
except ImportError:  # installed without a compiler
    _kernels = None  # type: ignore[assignment]

TORCH: Final = "torch"
DTYPES: Final = (torch.float32, torch.bfloat16)
"""Of the matrices that kernels read and write."""
_ELEMENTS: Final = 1 << 17
"""Of a matrix that are worth a thread."""
_chosen = os.environ.get("TEMPO_KERNELS", "") or None


def available() -> list[str]:
    """Instruction sets of this processor that there are kernels for, best first, and ``torch``."""
    return [*(_kernels.supported() if _kernels is not None else ()), TORCH]


def native() -> ModuleType | None:
    """The kernels to use, or None: use PyTorch."""
    return None if _chosen == TORCH else _kernels


def selected() -> str:
    """Which of `available` is in use."""
    found = native()
    return TORCH if found is None else str(found.selected())


def select(name: str) -> None:
    """Use ``name``, one of `available`, in this process from now on.

    Raises:
        SettingsError: It is not available.
    """
    global _chosen
    if name not in available():
        raise SettingsError(f"TEMPO_KERNELS={name!r}: here there are {', '.join(available())}")
    if name != TORCH and _kernels is not None:
        _kernels.select(name)
    _chosen = name


def in_parts(work: Callable[[int, int], None], size: int, least: int) -> None:
    """Call ``work(first, last)`` for parts of ``range(size)``, on as many threads as PyTorch uses.

    Args:
        work: Lets go of the interpreter.
        size: How many elements there are.
        least: How many are worth a thread.
    """
    threads = min(torch.get_num_threads(), size // least)
    if threads <= 1:
        work(0, size)
        return
    edges = [size * i // threads for i in range(threads + 1)]
    list(_pool(os.getpid(), threads).map(work, edges, edges[1:]))


def rows_in_parts(work: Callable[[slice], None], rows: int, columns: int) -> None:
    """Call ``work`` for parts of the ``rows`` of a matrix, as `in_parts` does."""
    in_parts(lambda first, last: work(slice(first, last)), rows, max(1, _ELEMENTS // max(1, columns)))


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: they do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="tempo-kernels")


@contextmanager
def using(name: str) -> Iterator[None]:
    """`select` for a while."""
    before = selected()
    select(name)
    try:
        yield
    finally:
        select(before)


if _chosen is not None:
    select(_chosen)

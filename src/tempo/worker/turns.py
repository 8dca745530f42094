"""Sessions take turns at the device: in the order in which they ask, one part of a product each.

A session computes on one thread, so whoever had a turn stands behind all others that wait: one that floods gets no
more turns than one that asks now and then. Large products are divided, so that no turn takes long, least of all while
another session is about.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Final, Self, final

ALONE: Final = 16
"""How many times larger parts may be while nobody else is about: then only the first to come would have to wait."""

_ABOUT: Final = 1.0
"""Seconds for which a session counts as being about after its turn."""


@final
class Turns:
    """A lock that serves in order of arrival, and how much to do under it at once.

    Args:
        quantum: FLOPs of a turn while several sessions are about.
    """

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False
        self._last = 0  # whose turn it was, and when that last changed
        self._changed = float("-inf")

    def __enter__(self) -> Self:
        """Wait for a turn. Not to be nested."""
        gate = threading.Lock()
        with self._lock:
            me = threading.get_ident()
            if me != self._last:
                self._changed = time.monotonic() if self._last else self._changed
                self._last = me
            if not self._taken:
                self._taken = True
                return self
            gate.acquire()
            self._waiting.append(gate)
        gate.acquire()  # until who had the turn hands it over
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    def parts(self, count: int, flops: int, least: int) -> Iterator[slice]:
        """Divide a product into what is to be done in one turn each.

        Args:
            count: Rows of the result.
            flops: Of the whole product.
            least: Rows below which a part would be slow for its size.
        """
        begin = 0
        while begin < count:
            quantum = self._quantum if self.shared else ALONE * self._quantum
            end = min(begin + max(least, count * quantum // max(flops, 1)), count)
            yield slice(begin, end)
            begin = end

    @property
    def shared(self) -> bool:
        """Whether several sessions are about."""
        return bool(self._waiting) or time.monotonic() - self._changed < _ABOUT

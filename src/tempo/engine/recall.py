"""Gets workers back that were lost: tries their addresses again until they answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final

from tempo.engine.link import Link
from tempo.errors import IdentityError, WorkerError

Dial = Callable[[Link], Link]
"""A new connection to the worker that a lost link was for."""

_PAUSES: Final = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Seconds between attempts; the last repeats."""

log = logging.getLogger("tempo")


class Recall:
    """Seeks lost workers, each in a thread of its own; those that are back wait to be taken.

    Args:
        dial: Makes one attempt.
    """

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._back: SimpleQueue[tuple[int, Link]] = SimpleQueue()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.sought = 0
        """How many are being sought, or are back and were not taken yet."""

    def seek(self, number: int, lost: Link) -> None:
        """Begin to seek the worker of that number."""
        self.sought += 1
        threading.Thread(target=self._seek, args=(number, lost), name=f"recall {lost.address}", daemon=True).start()

    def returned(self, patience: float = 0.0) -> tuple[int, Link] | None:
        """A worker that is back, under its old number; waits for one so many seconds."""
        try:
            found = self._back.get(timeout=patience) if patience else self._back.get_nowait()
        except Empty:
            return None
        self.sought -= 1
        return found

    def close(self) -> None:
        """Seek no more; connections that nobody took are closed."""
        with self._lock:
            self._over.set()
        while (found := self.returned()) is not None:
            found[1].close()

    def _seek(self, number: int, lost: Link) -> None:
        attempt = 0
        while not self._over.wait(_PAUSES[min(attempt, len(_PAUSES) - 1)]):
            attempt += 1
            try:
                link = self._dial(lost)
            except (WorkerError, IdentityError) as error:
                log.debug("worker %s is not back: %s", lost.address, error)
                continue
            with self._lock:
                if not self._over.is_set():
                    self._back.put((number, link))
                    return
            link.close()

"""Answers on their way out: sent at once, or by a thread of their own while a device computes the next ones."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Queue
from typing import Final, final

import torch

Deliver = Callable[[], None]
"""Finishes and sends an answer. Raises OSError when the connection is gone, and nothing else."""

DEPTH: Final = 2
"""Answers that may wait while the next is being computed: bounds what a session has queued on a device."""


@final
class Outbox:
    """Delivers in order.

    Args:
        threaded: Whether to deliver on a thread: for devices that queue.
        broken: Called once, on that thread, when the connection is gone.
    """

    def __init__(self, threaded: bool, broken: Callable[[], None]) -> None:
        self._broken = broken
        self._error: OSError | None = None
        self._waiting: Queue[Deliver | None] = Queue(DEPTH)
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True) if threaded else None
        if self._thread is not None:
            self._thread.start()

    def put(self, deliver: Deliver) -> None:
        """Deliver now, or soon.

        Raises:
            OSError: The connection is gone.
        """
        if self._error is not None:
            raise self._error
        if self._thread is None:
            deliver()
        else:
            self._waiting.put(deliver)

    def close(self) -> None:
        """Wait for what is on its way."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()

    @torch.inference_mode()
    def _work(self) -> None:
        while (deliver := self._waiting.get()) is not None:
            try:
                deliver()  # even if the connection is gone: it has memory to give back
            except OSError as error:
                if self._error is None:
                    self._error = error
                    self._broken()

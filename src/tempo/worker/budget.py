"""Memory accounting across all sessions of a worker."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Final, final

from tempo.errors import SettingsError
from tempo.wire.memory import Memory, PrivatePool, mapping
from tempo.worker.refusal import Refusal

_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40
}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``512MB`` or ``1000000``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?)B?", text.strip())
    if not match or match[2] not in _UNITS:
        raise SettingsError(f"memory limit {text!r} is not understood; write 8GiB or 500MB, say")
    return int(float(match[1]) * _UNITS[match[2]])


def human(size: int) -> str:
    """``size`` in a unit that reads well."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"


@final
class Budget:
    """The worker's memory limit, shared by its sessions, of which each may have a limit of its own.

    Args:
        limit: Of all sessions together.
        session_limit: Of each.
        allocate: Gives memory to receive into and to send from.
    """

    def __init__(
        self, limit: int, session_limit: int | None = None, allocate: Callable[[int], Memory] = mapping
    ) -> None:
        self.limit = limit
        self.allocate = allocate
        self.session_limit = limit if session_limit is None else session_limit
        self._used = 0
        self._lock = threading.Lock()
        self._accounts: set[Account] = set()

    @property
    def used(self) -> int:
        """Bytes in use, with what sessions hold in reserve."""
        return self._used

    def open(self) -> Account:
        """A session's account."""
        account = Account(self)
        with self._lock:
            self._accounts.add(account)
        return account

    def reserve(self, size: int) -> None:
        """Count ``size`` bytes as used, if need be after freeing what all sessions hold in reserve.

        Raises:
            Refusal: The limit would be exceeded.
        """
        if self._try(size):
            return
        with self._lock:
            accounts = list(self._accounts)
        spare = sum(account.spare for account in accounts)
        if self._used - spare + size <= self.limit:  # else nobody has to give up what would not be enough
            for account in accounts:
                account.trim()
        if not self._try(size):
            raise Refusal(
                "out-of-memory",
                f"{human(size)} more would exceed the memory limit of {human(self.limit)} ({human(self._used)} in use)",
            )

    def release(self, size: int) -> None:
        """Count ``size`` bytes as free again."""
        with self._lock:
            self._used -= size

    def forget(self, account: Account) -> None:
        """Drop a closed account."""
        with self._lock:
            self._accounts.discard(account)

    def _try(self, size: int) -> bool:
        with self._lock:
            if self._used + size > self.limit:
                return False
            self._used += size
            return True


@final
class Account:
    """What one session uses. Closing it frees all of it, so that no failure can leak."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._used = 0
        self._lock = threading.Lock()
        self.pool = PrivatePool(self.reserve, self.release, budget.allocate)  # for what arrives and is kept
        self.answers = PrivatePool(self.reserve, self.release, budget.allocate)  # for what is sent

    def reserve(self, size: int) -> None:
        """Use ``size`` bytes, or raise `Refusal`."""
        limit = self._budget.session_limit
        if self._used + size > limit:
            self.trim()
        if self._used + size > limit:
            raise Refusal(
                "out-of-memory",
                f"{human(size)} more would exceed a session's limit of {human(limit)} ({human(self._used)} in use)",
            )
        self._budget.reserve(size)
        with self._lock:
            self._used += size

    def release(self, size: int) -> None:
        """Use ``size`` bytes less."""
        with self._lock:
            self._used -= size
        self._budget.release(size)

    @property
    def spare(self) -> int:
        """Bytes that are only held in reserve."""
        return self.pool.spare + self.answers.spare

    def trim(self) -> None:
        """Let go of what is only held in reserve."""
        self.pool.trim()
        self.answers.trim()

    def close(self) -> None:
        """Free all that is left."""
        self.trim()
        self._budget.forget(self)
        self.release(self._used)

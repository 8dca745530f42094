"""Every primitive behind a mask, in one file.

HKDF-SHA256 (RFC 5869) turns a run's secret into one AES-256 key per label; AES-CTR expands that key into a keystream.
Its first half, extraction, does not depend on the label and is done once a run.
Each key encrypts zeros once, from counter 0, so no (key, counter) pair ever repeats. Secret and nonce come from the
operating system's CSPRNG in this process, at every start, resume and fork, and are never written anywhere.

The rule behind the labels: identical masked bytes may be sent again; changed plaintext never meets the same mask. So
a counter is drawn for *every* encoding, and none is ever reset or chosen by a caller.
"""

from __future__ import annotations

import hmac
import os
import threading
from collections import Counter

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from tempo import kernels
from tempo.errors import UnsafeError

_SECRET_BYTES = 32
_AT_ONCE = 1 << 16
_ZEROS = memoryview(bytes(_AT_ONCE))
_FROM_ZERO = modes.CTR(bytes(16))
_SIGNLESS = np.int64((1 << 63) - 1)


class Keystream:
    """AES-256-CTR over zeros: a pseudo-random byte stream, read once from start to end."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), _FROM_ZERO).encryptor()

    def read(self, count: int) -> NDArray[np.uint8]:
        """The next ``count`` bytes."""
        out = np.empty(count, dtype=np.uint8)
        for start in range(0, count, _AT_ONCE):
            part = out.data[start : start + _AT_ONCE]
            self._encryptor.update_into(_ZEROS[: part.nbytes], part)
        return out

    def integers(self, low: int, high: int, count: int) -> NDArray[np.int64]:
        """``count`` integers, exactly uniform on ``low .. high`` inclusive."""
        span = high - low + 1
        if not 0 < span <= 1 << 32:
            raise ValueError(f"range {low}..{high} is empty or wider than 32 bits")
        if native := kernels.native():
            while not native.integers(draws := self._words(count), low, span):
                pass
            return draws
        # Below the largest multiple of the span, all remainders are as likely.
        limit = (1 << 63) // span * span
        while (draws := self._words(count) & _SIGNLESS).max(initial=0) >= limit:
            pass
        return low + draws % span

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A uniform permutation of ``0 .. count-1``: by Fisher and Yates, or the order of ``count`` distinct draws."""
        if native := kernels.native():
            while not native.permutation(draws := self._words(count)):
                pass
            return draws
        while True:
            draws = self._words(count)
            order = draws.argsort()
            ascending = draws[order]
            # Equal draws would favour one order; at a million elements this happens once in 10^7 keys.
            if (ascending[1:] != ascending[:-1]).all():
                return order

    def _words(self, count: int) -> NDArray[np.int64]:
        return self.read(8 * count).view(np.int64)


def root_of(secret: bytes, nonce: bytes) -> bytes:
    """What the keys of a run are expanded from: HKDF's extraction, with the nonce as its salt."""
    return hmac.digest(nonce, secret, "sha256")


class Key:
    """The key of one label. `stream` names its independent uses (a mask per axis, say)."""

    __slots__ = ("_root", "label")

    def __init__(self, root: bytes, label: str) -> None:
        self._root = root
        self.label = label

    def stream(self, use: str) -> Keystream:
        """The keystream for one use of this key; the same use gives the same stream."""
        # HKDF's expansion into one block.
        return Keystream(hmac.digest(self._root, f"tempo/1/{self.label}/{use}\x01".encode(), "sha256"))

    def branch(self, name: str) -> Key:
        """A key of its own for one part of what this one is for; the same name gives the same key."""
        return Key(self._root, f"{self.label}/{name}")

    def __repr__(self) -> str:
        return f"Key({self.label})"


class KeySchedule:
    """The keys of one run of one trusted process.

    Args:
        rank: Number of this trusted process among several of one job, part of every label.

    A label is (run nonce, rank, layer instance, role, call counter, attempt). The schedule owns the counters.
    """

    def __init__(self, rank: int = 0) -> None:
        self._root = root_of(secret=os.urandom(_SECRET_BYTES), nonce=os.urandom(_SECRET_BYTES))
        self._rank = rank
        self._pid = os.getpid()
        self._calls: Counter[tuple[int, str]] = Counter()
        self._lock = threading.Lock()

    def fresh(self, layer: int, role: str, attempt: int = 0) -> Key:
        """A key that has never been given out before.

        Raises:
            UnsafeError: This process is a fork of the one that made the schedule: both would draw the same masks.
        """
        self.check_process()
        with self._lock:
            call = self._calls[layer, role]
            self._calls[layer, role] = call + 1
        return Key(self._root, f"{self._rank}/{layer}/{role}/{call}/{attempt}")

    def check_process(self) -> None:
        """Raise `UnsafeError` in a forked child."""
        if os.getpid() != self._pid:
            raise UnsafeError(
                "this process is a fork of the one that opened the session, so it would reuse its masks; "
                "open a session of its own in the child (data loader workers should not run the protected model)"
            )

    def __reduce__(self) -> str | tuple[object, ...]:
        raise UnsafeError("a key schedule cannot be copied or stored: open a new session instead")

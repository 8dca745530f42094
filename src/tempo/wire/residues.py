"""Integers mod p in which scheme `split` computes, and the shares that both sides expand from a seed.

A residue is the representative of least magnitude, ``|v| ≤ HALF``, as int32. ``p`` is the largest prime below 2^32:
every residue is a word that travels as it is, and every word but five is a residue.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Final

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from tempo import kernels

P: Final = (1 << 32) - 5
HALF: Final = (P - 1) // 2
"""The largest residue; the least is its negative."""

SEED_BYTES: Final = 32

_BLOCK: Final = 4
"""Words of a block of AES."""
_LEAST: Final = 1 << 16
"""Blocks that are worth a thread."""
_ZEROS: Final = bytes(1 << 16)
_FIRST: Final = bytes(16)
_AGAIN: Final = bytes([0x80]) + bytes(15)
"""Counters from which words are drawn, and from which those are that take the place of refused ones."""


class _Words:
    """AES-256-CTR over zeros, as little-endian int32."""

    def __init__(self, seed: bytes, counter: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(seed), modes.CTR(counter)).encryptor()

    def fill(self, out: NDArray[np.int32]) -> None:
        view = out.view(np.uint8).data
        for start in range(0, len(view), len(_ZEROS)):
            part = view[start : start + len(_ZEROS)]
            self._encryptor.update_into(_ZEROS[: len(part)], part)
        if not np.little_endian:
            out.byteswap(inplace=True)


def replacements(seed: bytes, half: int = HALF) -> Iterator[int]:
    """What takes the places of words of ``seed`` that were refused, in ascending order of their elements."""
    words, word = _Words(seed, _AGAIN), np.empty(1, np.int32)
    while True:
        words.fill(word)
        if abs(int(word[0])) <= half:
            yield int(word[0])


def expand(seed: bytes, out: Tensor, half: int = HALF) -> Tensor:
    """Fill ``out`` with residues, uniform and independent as far as AES-256-CTR is a pseudo-random generator.

    Element i is word i of the keystream from counter 0. Where that word is not a residue, it is the next word from
    counter 2^127 that is one, in ascending order of such elements.

    Args:
        seed: 32 bytes, used for nothing else.
        out: int32, contiguous, on the CPU.
        half: The largest residue; others only in tests, where refusals have to be frequent.

    Returns:
        ``out``.
    """
    if len(seed) != SEED_BYTES or out.dtype != torch.int32 or not out.is_contiguous():
        raise ValueError(
            f"a seed of {len(seed)} bytes, a share of {out.dtype}; 32 bytes and contiguous int32 are needed"
        )
    if not out.numel():
        return out
    words = out.view(-1)
    native = kernels.native()
    refused = _natively(native, seed, words, half) if native and native.shares() else _in_numpy(seed, words, half)
    for i, word in zip(refused, replacements(seed, half), strict=False):
        words[i] = word
    return out


def _natively(native: ModuleType, seed: bytes, words: Tensor, half: int) -> list[int]:
    """Fill ``words`` from counter 0; which of them are none that is wanted."""
    refused: list[int] = []

    def part(first: int, last: int) -> None:
        refused.extend(native.expand(seed, first, words[first * _BLOCK : last * _BLOCK], half))

    kernels.in_parts(part, -(-words.numel() // _BLOCK), _LEAST)
    return sorted(refused)


def _in_numpy(seed: bytes, words: Tensor, half: int) -> list[int]:
    """The same."""
    found = words.numpy()
    _Words(seed, _FIRST).fill(found)
    if int(found.min()) >= -half and int(found.max()) <= half:
        return []
    refused: list[int] = np.flatnonzero((found < -half) | (found > half)).tolist()
    return refused


def reduce_(v: Tensor) -> Tensor:
    """``v``, int64 or float64 that holds integers up to 2^53 - p, as residues of the same dtype, in place."""
    if v.is_floating_point():  # the first quotient may be off by one; the second is exact, and both are fast
        for _ in range(2):
            v.sub_(v.mul(1 / P).round_(), alpha=P)
        return v
    v.remainder_(P)
    return v.sub_(P * (v > HALF))

"""Shares are the keystream that both sides can make, whatever computes it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo import kernels
from tempo.wire.residues import HALF, SEED_BYTES, P, expand

SEEDS = st.binary(min_size=SEED_BYTES, max_size=SEED_BYTES)
REFUSING = {1137460: 138, 4643994: 205}
"""Seeds, as little-endian numbers, and the element whose first word is refused: five words in 2^32 are."""


@pytest.fixture(params=kernels.available(), autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels.using(request.param):
        yield


def words(seed: bytes, counter: int) -> Iterator[int]:
    """The definition, one block after the other."""
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(counter.to_bytes(16, "big"))).encryptor()
    while True:
        yield from struct.unpack("<4i", encryptor.update(bytes(16)))


def expected(seed: bytes, count: int, half: int) -> list[int]:
    first, again = words(seed, 0), words(seed, 1 << 127)
    found = [next(first) for _ in range(count)]
    return [w if abs(w) <= half else next(a for a in again if abs(a) <= half) for w in found]


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.integers(0, 700), st.sampled_from([HALF, HALF // 2, HALF // 50]))
def test_a_share_is_what_its_definition_says(seed: bytes, count: int, half: int) -> None:
    out = torch.empty(count, dtype=torch.int32)
    assert expand(seed, out, half) is out
    assert out.tolist() == expected(seed, count, half)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_share_that_threads_part_is_the_same(threads: int) -> None:
    """Refused elements take others in the order of elements, whichever thread met them."""
    seed, count, half, before = bytes(range(32)), (1 << 20) + 5, HALF - HALF // 10000, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = expand(seed, torch.empty(count, dtype=torch.int32), half)
    finally:
        torch.set_num_threads(before)
    text = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(4 * count))
    first, again = torch.frombuffer(bytearray(text), dtype=torch.int32), words(seed, 1 << 127)
    refused = ((first > half) | (first < -half)).nonzero().flatten().tolist()
    assert len(refused) > 20
    for i in refused:
        first[i] = next(a for a in again if abs(a) <= half)
    assert torch.equal(out, first)


def test_a_published_vector_of_aes() -> None:
    """NIST AESAVS, ECBKeySbox256, count 0: a block of zeros, which is the first counter."""
    key = bytes.fromhex("c47b0294dbbbee0fec4757f22ffeee3587ca4730c3d33b691df38bab076bc558")
    out = expand(key, torch.empty(4, dtype=torch.int32))
    assert out.numpy().tobytes().hex() == "46f2fb342d6f0ab477476fc501242c5f"


@pytest.mark.parametrize(("number", "element"), REFUSING.items())
def test_words_that_are_no_residues_are_refused(number: int, element: int) -> None:
    seed = number.to_bytes(SEED_BYTES, "little")
    out = expand(seed, torch.empty(256, dtype=torch.int32))
    assert out.tolist() == expected(seed, 256, HALF)
    assert out[element] == next(words(seed, 1 << 127))
    assert 2 * HALF + 1 == P


@pytest.mark.parametrize(
    ("seed", "out"),
    [
        (bytes(31), torch.empty(4, dtype=torch.int32)),
        (bytes(32), torch.empty(4)),
        (bytes(32), torch.empty(4, 4, dtype=torch.int32).t()),
    ],
)
def test_what_does_not_fit_is_refused(seed: bytes, out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="32 bytes and contiguous int32 are needed"):
        expand(seed, out)

"""The key schedule: known vectors, uniformity, and that no key is ever given out twice."""

from __future__ import annotations

import copy
import os
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo import kernels
from tempo.errors import UnsafeError
from tempo.keys import Key, KeySchedule, Keystream, root_of


def test_keystream_is_aes_ctr_from_counter_zero():
    # NIST SP 800-38A's AES-256 key; the first block is AES-256 of the zero block, known from the ECB definition.
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    ecb = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - the definition of CTR mode
    expected = b"".join(ecb.update(i.to_bytes(16, "big")) for i in range(4))
    assert Keystream(key).read(64).tobytes() == expected


def test_hkdf_label_derivation_is_pinned():
    # A frozen vector: a change of derivation must be a decision, not an accident.
    key = Key(root_of(secret=bytes(range(32)), nonce=bytes(32)), "0/7/x/3/0")
    assert key.stream("A").read(16).tobytes().hex() == "03c9a1ca444bcd5e3565ce0f6492e487"


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=4))
def test_reading_in_pieces_gives_one_stream(sizes):
    pieces = Keystream(bytes(32))
    whole = Keystream(bytes(32)).read(sum(sizes))
    assert np.array_equal(np.concatenate([pieces.read(n) for n in sizes]), whole)


@pytest.fixture(params=["kernels", kernels.TORCH])
def either(request):
    """With native kernels, if there are any, and without."""
    with kernels.using(kernels.available()[0] if request.param == "kernels" else kernels.TORCH):
        yield


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("count", [0, 1, 2, 3, 100, 3000])
def test_permutation_is_a_permutation(count):
    assert sorted(KeySchedule().fresh(1, "x").stream("p").permutation(count)) == list(range(count))


@pytest.mark.usefixtures("either")
def test_permutations_are_uniform():
    stream = KeySchedule().fresh(1, "x").stream("p")
    counts = Counter(tuple(stream.permutation(4)) for _ in range(6000))
    # Each of 24 is binomial(6000, 1/24): six standard deviations are 93.
    assert len(counts) == 24
    assert max(abs(found - 250) for found in counts.values()) < 93


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(("low", "width"), [(-50, 0), (-3, 300), (0, 1), (7, (1 << 32) - 1)])
def test_integers_stay_in_range(low, width):
    draws = KeySchedule().fresh(1, "x").stream("i").integers(low, low + width, 500)
    assert len(draws) == 500
    assert draws.min() >= low
    assert draws.max() <= low + width
    assert len(KeySchedule().fresh(1, "x").stream("i").integers(low, low + width, 0)) == 0


@pytest.mark.usefixtures("either")
def test_integers_are_uniform():
    draws = KeySchedule().fresh(1, "x").stream("i").integers(1, 255, 255_000)
    counts = np.bincount(draws, minlength=256)[1:]
    assert abs(counts - 1000).max() < 6 * 1000**0.5


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("draw", [lambda s: s.permutation(3), lambda s: s.integers(0, 2, 3)])
def test_words_that_would_favour_something_are_drawn_again(draw, monkeypatch):
    # One word more would give one of three numbers than another; and nothing says how to sort equal ones.
    unfair, fair = np.full(3, (1 << 63) - 1 if kernels.selected() == kernels.TORCH else 0), np.array([1, 2, 3]) << 61
    given = iter([unfair, fair])
    stream = Keystream(bytes(32))
    monkeypatch.setattr(stream, "read", lambda count: next(given).view(np.uint8))
    draw(stream)
    assert next(given, None) is None


def test_every_key_is_new():
    schedule = KeySchedule()
    keys = [schedule.fresh(layer, role) for layer in (1, 2) for role in "xwg" for _ in range(50)]
    assert len({key.stream("A").read(32).tobytes() for key in keys}) == len(keys)
    assert len({key.label for key in keys}) == len(keys)


def test_runs_do_not_share_keys():
    assert KeySchedule().fresh(1, "x").stream("A").read(32).tobytes() != (
        KeySchedule().fresh(1, "x").stream("A").read(32).tobytes()
    )


def test_seeding_torch_numpy_and_python_changes_nothing_about_masks():
    def permutation() -> list[int]:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return KeySchedule().fresh(1, "x").stream("A").permutation(100).tolist()

    assert permutation() != permutation()


def test_drawing_masks_consumes_no_torch_or_numpy_randomness():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    KeySchedule().fresh(1, "x").stream("A").permutation(100)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_a_fork_cannot_draw_the_same_masks():
    schedule = KeySchedule()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            schedule.fresh(1, "x")
            os.write(write, b"drawn")
        except UnsafeError:
            os.write(write, b"refused")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"refused"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_schedule_cannot_be_copied_or_stored(duplicate):
    with pytest.raises(UnsafeError):
        duplicate(KeySchedule())


def test_no_secret_in_representations():
    schedule = KeySchedule()
    key = schedule.fresh(3, "w")
    assert repr(key) == "Key(0/3/w/0/0)"
    assert schedule._root.hex() not in repr(schedule)


def test_a_branch_of_a_key_is_a_key_of_its_own():
    key = KeySchedule().fresh(1, "w")
    streams = [key, key.branch("part0"), key.branch("part1"), key.branch("part0").branch("part0")]
    drawn = [stream.stream("A").read(16).tobytes() for stream in streams]
    assert len(set(drawn)) == len(drawn)
    assert key.branch("part1").stream("A").read(16).tobytes() == drawn[2]

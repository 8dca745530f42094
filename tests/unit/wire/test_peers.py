"""Which certificates may be shown for which operator."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo.errors import IdentityError
from tempo.wire import identity
from tempo.wire.peers import Peers, read

OPERATORS = st.sampled_from(["one", "two", "gpu-a"])
CERTIFICATES = [b"a", b"b", b"c", b"d"]


@given(st.dictionaries(st.sampled_from(CERTIFICATES), OPERATORS | st.just("")), st.sets(OPERATORS), OPERATORS)
def test_an_operator_with_a_folder_is_answered_for_by_its_own_certificates_and_no_other(whose, empty, operator):
    names = {"", *empty, *whose.values()}
    found = Peers(Path("p"), {name: frozenset(c for c in whose if whose[c] == name) for name in names})
    allowed = {c for c in CERTIFICATES if not found.mistaken(c, operator)}
    assert allowed == found.of(operator)
    assert allowed == {c for c in whose if whose[c] == (operator if operator in names else "")}
    assert bool(found.unbound(operator)) == (operator not in names)


def keys(folder: Path, *names: str) -> list[str]:
    """The text of new certificates."""
    return [identity.generate(folder, name)[1].read_text() for name in names]


def test_folders_are_operators_and_files_beside_them_are_of_none(tmp_path):
    a, b, c, d = keys(tmp_path, *"abcd")
    peers = tmp_path / "peers"
    (peers / "one").mkdir()
    (peers / "two").mkdir()
    (peers / "a.pub").write_text(a)
    (peers / "one" / "gpus.pub").write_text(b + c)
    (peers / "one" / "a.pub").write_text(a)  # an operator's may lie in `peers` too
    (peers / "one" / "readme.txt").write_text(d)
    found = read(peers, "workers")
    assert [len(found.of(name)) for name in ("", "one", "two", "three")] == [1, 3, 0, 1]
    assert found.place("one") == peers / "one"
    assert found.place("three") == peers
    assert found.unbound("one") == ""
    assert str(peers / "three") in found.unbound("three")
    alone = read(tmp_path / "a.pub", "workers")
    assert alone.of("one") == found.of("")
    assert "give a folder as peers" in alone.unbound("one")


def test_one_certificate_cannot_be_of_two_operators(tmp_path):
    (a,) = keys(tmp_path, "a")
    for operator in ("one", "two"):
        (tmp_path / "peers" / operator).mkdir()
        (tmp_path / "peers" / operator / f"{operator}.pub").write_text(a)
    with pytest.raises(IdentityError, match=r"peers/one and .*peers/two hold the same certificate"):
        read(tmp_path / "peers", "workers")


def test_whose_a_mistaken_certificate_is_and_what_to_do_is_said(tmp_path):
    found = Peers(tmp_path, {"": frozenset({b"a", b"b"}), "one": frozenset({b"b"}), "two": frozenset()})
    assert f"operator 'one' ({tmp_path / 'one'}), not of 'two': if 'one'" in found.mistaken(b"b", "two")
    assert f"lies in {tmp_path}, not among those of operator 'one' in" in found.mistaken(b"a", "one")
    assert f"not among {tmp_path / 'one'}: copy" in found.mistaken(b"c", "one")
    assert f"not among {tmp_path}: copy" in found.mistaken(b"c", "three")

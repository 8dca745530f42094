"""Key pairs, pinned certificates and mutual TLS."""

from __future__ import annotations

import socket
import stat
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tempo.cli import app
from tempo.errors import IdentityError
from tempo.wire import identity


def test_keygen_says_where_the_files_are_and_keeps_the_key_private(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["keygen", "alice", "--dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    key, pub = tmp_path / "alice.key", tmp_path / "alice.pub"
    assert str(key) in result.output
    assert str(pub) in result.output
    assert "SHA256:" in result.output
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "BEGIN CERTIFICATE" in pub.read_text()
    assert "PRIVATE" not in pub.read_text()


def test_an_existing_key_is_only_replaced_by_force(tmp_path: Path) -> None:
    key, _, first = identity.generate(tmp_path)
    before = key.read_bytes()
    with pytest.raises(IdentityError, match="--force"):
        identity.generate(tmp_path)
    assert key.read_bytes() == before
    *_, second = identity.generate(tmp_path, force=True)
    assert second != first


def test_a_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="name"):
        identity.generate(tmp_path, "../x")


def test_home_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPO_HOME", str(tmp_path / "home"))
    with pytest.raises(IdentityError, match="tempo keygen"):
        identity.load(None, None, server=False)
    _, pub, _ = identity.generate(identity.home())
    with pytest.raises(IdentityError, match=r"no \.pub files"):
        identity.load(None, None, server=False)
    (tmp_path / "home" / "peers" / "me.pub").write_bytes(pub.read_bytes())
    assert len(identity.load(None, None, server=False).peers.of("")) == 1
    (tmp_path / "home" / "peers" / "two").mkdir()
    assert identity.load(None, None, server=False, operator="one").operator == "one"
    with pytest.raises(IdentityError, match=r"no \.pub files in \S*/peers/two: put"):
        identity.load(None, None, server=False, operator="two")


def test_what_cannot_be_used_is_explained(tmp_path: Path) -> None:
    key, pub, _ = identity.generate(tmp_path)
    with pytest.raises(IdentityError, match=r"put the \.pub files"):
        identity.load(key, tmp_path / "nowhere", server=True)
    (tmp_path / "bad.pub").write_text("hello")
    with pytest.raises(IdentityError, match="holds no certificate"):
        identity.load(key, tmp_path / "bad.pub", server=True)
    key.chmod(0o640)
    with pytest.raises(IdentityError, match="chmod 600"):
        identity.load(key, pub, server=True)
    key.chmod(0o600)
    key.write_text("damaged")
    with pytest.raises(IdentityError, match="cannot be used"):
        identity.load(key, pub, server=True)
    pub.unlink()
    with pytest.raises(IdentityError, match=r"no .*identity\.pub"):
        identity.load(key, tmp_path, server=True)


def test_certificates_of_one_name_are_not_confused(tmp_path: Path) -> None:
    pubs = []
    for folder in "abcd":
        _, pub, _ = identity.generate(tmp_path / folder)
        pubs.append(pub)
    everyone = tmp_path / "everyone.pub"
    everyone.write_text("".join(pub.read_text() for pub in pubs))
    for folder in "abcd":
        here, there = socket.socketpair()
        server = identity.load(tmp_path / "a" / "identity.key", everyone, server=True)
        client = identity.load(tmp_path / folder / "identity.key", tmp_path / "a" / "identity.pub", server=False)
        accepted: list[object] = []
        thread = threading.Thread(target=lambda: accepted.append(identity.accept(there, server, 10)))  # noqa: B023
        thread.start()
        tls = identity.connect(here, client, 10)
        thread.join()
        assert tls.version() == "TLSv1.3"
        tls.close()
        accepted[0].close()

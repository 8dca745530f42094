"""Addresses: every address that can be written down is read back as itself."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo.errors import AddressError
from tempo.wire.address import Address

names = st.from_regex(r"[a-zA-Z0-9]([a-zA-Z0-9._-]{0,8}[a-zA-Z0-9])?", fullmatch=True)
hosts = names | st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str)
tcp = st.builds(
    lambda group, host, port, operator: Address(group, host, port, operator or host),
    st.just("") | names,
    hosts,
    st.integers(0, 65535),
    st.just("") | names,
)
unix = st.builds(
    lambda path, operator: Address(path=path, operator=operator),
    st.from_regex(r"(/[a-zA-Z0-9 ._:-]{1,8}){1,3}", fullmatch=True),
    st.just("local") | names,
)


@given(tcp | unix)
def test_an_address_survives_being_written_down(address: Address) -> None:
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu-a:7070", Address(host="gpu-a", port=7070, operator="gpu-a")),
        ("[::1]:7070@acme", Address(host="::1", port=7070, operator="acme")),
        ("left:10.0.0.1:7070@acme", Address(group="left", host="10.0.0.1", port=7070, operator="acme")),
        ("unix:/run/tempo.sock", Address(path="/run/tempo.sock", operator="local")),
        ("unix:/run/tempo.sock@b", Address(path="/run/tempo.sock", operator="b")),
    ],
)
def test_grammar(text: str, expected: Address) -> None:
    assert Address.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("gpu-a", "gpu-a:7070"),
        ("gpu-a:70700", "65535"),
        ("unix:run/tempo.sock", "absolute"),
        ("::1:7070", r"\[fe80::1\]:7070"),
        ("http://gpu-a:7070", "host:port"),
        ("gpu-a:7070@", "operator"),
        ("", "host:port"),
        ("gpu-a:7070\n", "host:port"),
    ],
)
def test_a_bad_address_is_explained(text: str, advice: str) -> None:
    with pytest.raises(AddressError, match=advice):
        Address.parse(text)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_an_address_error(text: str) -> None:
    with contextlib.suppress(AddressError):
        Address.parse(text)

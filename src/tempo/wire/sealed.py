"""What follows the TLS handshake: AES-256-GCM in large chunks on the bare socket, since `ssl` is slow.

TLS 1.3 with pinned certificates says who is there (`tempo.wire.identity`). Inside it each side sends 32 random bytes,
and then TLS is left. From the two secrets come two keys by HKDF-SHA256, one for each direction; a party that draws
its own afresh makes both new, so nothing of another connection, or of the other direction, ever opens. The bytes of
one direction travel in chunks::

    length u32, little endian · AES-256-GCM(key, nonce = number of the chunk, data = the length) · tag, 16 bytes

Chunks are numbered from 0 by both sides and the number is not sent, so one that is changed, dropped, sent again, put
elsewhere or cut short does not open, and the first that does not open is the last that is looked at. After every
`CHUNKS_PER_KEY` chunks the key is replaced by one derived from it. Nothing says that no more chunks come: whoever can
cut the connection can do so at any time, and an answer that is still due then counts as lost.
"""

from __future__ import annotations

import socket
import ssl
import struct
from typing import Final, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from tempo.errors import ProtocolError
from tempo.wire.stream import Stream

CHUNK: Final = 256 << 10
"""Most bytes in one chunk: the sealed copy stays in the processor's cache on its way to the kernel."""

CHUNKS_PER_KEY: Final = 1 << 20
"""At most 2³⁴ blocks of AES under one key, as many as TLS 1.3 allows: nobody tells them from random."""

_SMALL: Final = 8 << 10
"""Frames of no more bytes are copied into one chunk."""

_LENGTH: Final = struct.Struct("<I")
_TAG: Final = 16
_SECRET: Final = 32
_OPENING: Final = b"tempo sealed 1\n"
"""What comes before a secret inside TLS, so that another version is known for what it is."""


def leave_tls(tls: ssl.SSLSocket, *, server: bool, timeout: float | None = None) -> SealedStream:
    """Exchange secrets inside TLS, the client first, and go on without it. Takes ``tls`` over.

    Args:
        tls: Connected, both certificates checked; its timeout bounds the exchange.
        server: For the worker's end of the connection.
        timeout: Of the stream.

    Raises:
        ProtocolError: The other end speaks another version.
        OSError: The other end closed, or broke TLS: it refused our certificate, most likely.
    """
    try:
        ours, theirs = AESGCM.generate_key(8 * _SECRET), b""
        if server:
            theirs = _receive_secret(tls)
        tls.sendall(_OPENING + ours)
        if not server:
            theirs = _receive_secret(tls)
        # Nothing can be left inside TLS: each side speaks next when it has what the other sent last.
        sock = socket.socket(fileno=tls.detach())
    except BaseException:
        tls.close()
        raise
    client_secret, server_secret = (theirs, ours) if server else (ours, theirs)
    both = HKDF(SHA256(), 2 * _SECRET, salt=None, info=b"tempo wire, client then server").derive(
        client_secret + server_secret
    )
    client, worker = Chain(both[:_SECRET]), Chain(both[_SECRET:])
    sealing, opening = (worker, client) if server else (client, worker)
    return SealedStream(sock, sealing, opening, timeout)


def _receive_secret(tls: ssl.SSLSocket) -> bytes:
    received = b""
    while len(received) < len(_OPENING) + _SECRET:
        if not (more := tls.recv(len(_OPENING) + _SECRET - len(received))):
            raise ConnectionError("the other end closed the connection after the handshake")
        received += more
        if not received.startswith(_OPENING[: len(received)]):
            raise ProtocolError("the other end speaks another protocol inside TLS: install the same version on both")
    return received[len(_OPENING) :]


@final
class Chain:
    """The keys and nonces of one direction, each pair used once."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.count = 0

    def next(self) -> tuple[AESGCM, bytes]:
        """Cipher and nonce of the next chunk."""
        if self.count % CHUNKS_PER_KEY == 0:
            both = HKDFExpand(SHA256(), 2 * _SECRET, info=b"tempo wire, next then key").derive(self._secret)
            self._secret, self._cipher = both[:_SECRET], AESGCM(both[_SECRET:])
        nonce = self.count.to_bytes(12, "big")
        self.count += 1
        return self._cipher, nonce


@final
class SealedStream(Stream):
    """A socket on which all bytes are sealed."""

    def __init__(self, sock: socket.socket, sealing: Chain, opening: Chain, timeout: float | None = None) -> None:
        super().__init__(sock, timeout)
        self._sealing, self._opening = sealing, opening
        size = _LENGTH.size + CHUNK + _TAG
        self._sent, self._came = memoryview(bytearray(size)), memoryview(bytearray(size))
        self._opened = memoryview(bytearray(CHUNK))
        self._left = self._opened[:0]  # what was opened and not yet read
        self._broken = False

    def read_some(self, view: memoryview) -> int:
        """As in `Stream`; at most one chunk at a time, opened in place where it fits.

        Raises:
            ProtocolError: What came was not sealed by the other end, or not as the next chunk. The connection is over:
                nothing is opened any more, and what lies in ``view`` is not to be used.
        """
        if not self._left:
            if self._broken:
                raise ProtocolError("an earlier chunk did not open, so this connection is over")
            try:
                length = self._next_chunk()
                if not length:
                    return 0
                whole = length <= len(view)
                self._open(view[:length] if whole else self._opened[:length])
            except ProtocolError:
                self._broken = True
                raise
            if whole:
                return length
            self._left = self._opened[:length]
        count = min(len(self._left), len(view))
        view[:count], self._left = self._left[:count], self._left[count:]
        return count

    def _next_chunk(self) -> int:
        """Receive a chunk, still sealed, and return its length; 0 if the other end closed before it."""
        if not (count := self._receive(self._came[: _LENGTH.size])):
            return 0
        try:
            self._receive_all(self._came[count : _LENGTH.size])
            (length,) = _LENGTH.unpack_from(self._came)
            if not 0 < length <= CHUNK:
                raise ProtocolError(f"a sealed chunk of {length} bytes; the limit is {CHUNK}")
            self._receive_all(self._came[_LENGTH.size : _LENGTH.size + length + _TAG])
        except (EOFError, TimeoutError) as error:
            raise ProtocolError(f"chunk {self._opening.count} is cut short: {error}") from None
        return int(length)

    def _receive_all(self, view: memoryview) -> None:
        while view:
            if not (count := self._receive(view)):
                raise EOFError("the other end closed the connection in the middle of it")
            view = view[count:]

    def _open(self, plain: memoryview) -> None:
        cipher, nonce = self._opening.next()
        header, sealed = self._came[: _LENGTH.size], self._came[_LENGTH.size : _LENGTH.size + len(plain) + _TAG]
        try:
            cipher.decrypt_into(nonce, sealed, header, plain)
        except InvalidTag:
            raise ProtocolError(
                f"chunk {self._opening.count - 1} was not sealed as it came: something between the two ends changes, "
                "drops, repeats or inserts bytes"
            ) from None

    def _write_some(self, buffers: list[memoryview], descriptor: int | None) -> int:
        if descriptor is not None:
            raise ValueError("no descriptor travels between hosts")
        plain = buffers[0][:CHUNK]
        if len(buffers) > 1 and sum(map(len, buffers)) <= _SMALL:
            plain = memoryview(b"".join(buffers))
        cipher, nonce = self._sealing.next()
        header, end = self._sent[: _LENGTH.size], _LENGTH.size + len(plain) + _TAG
        _LENGTH.pack_into(header, 0, len(plain))
        cipher.encrypt_into(nonce, plain, header, self._sent[_LENGTH.size : end])
        left = self._sent[:end]
        while left:
            left = left[self._send([left]) :]
        return len(plain)

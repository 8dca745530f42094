"""Who may connect to whom: Ed25519 key pairs, self-signed certificates, mutual TLS 1.3 with pinned peers.

``NAME.key`` (PEM, PKCS #8, mode 0600) stays where it was made; ``NAME.pub`` (PEM certificate) is copied into the
``peers`` folder of whoever should trust it. There is no authority: a peer is trusted if its certificate, byte for
byte, is one of those that `tempo.wire.peers` has for its operator.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import final

from tempo.errors import IdentityError
from tempo.wire import peers as trusted
from tempo.wire.peers import Peers


def home() -> Path:
    """Tempo's configuration folder: ``$TEMPO_HOME``, else ``~/.config/tempo``."""
    return Path(os.environ.get("TEMPO_HOME") or Path.home() / ".config" / "tempo")


def fingerprint(der: bytes) -> str:
    """A certificate's fingerprint, for people to compare."""
    return "SHA256:" + hashlib.sha256(der).hexdigest()


def generate(folder: Path, name: str = "identity", *, force: bool = False) -> tuple[Path, Path, str]:
    """Make a key pair.

    Returns:
        The paths of the private key and of the certificate, and the certificate's fingerprint.

    Raises:
        IdentityError: The key exists already (and not ``force``), or cannot be written.
    """
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise IdentityError(f"{name!r} is not a good name for a key: use letters, digits, dots and dashes")
    key_path, pub_path = folder / f"{name}.key", folder / f"{name}.pub"
    if not force and (key_path.exists() or pub_path.exists()):
        raise IdentityError(f"{key_path} exists already; choose another name, or --force to replace it for good")
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    # The subject is unique to the key, so that two certificates of one name are never taken for one another.
    subject = x509.Name(
        [
            x509.NameAttribute(x509.NameOID.COMMON_NAME, name),
            x509.NameAttribute(x509.NameOID.SERIAL_NUMBER, hashlib.sha256(public).hexdigest()[:32]),
        ]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))  # clocks may disagree
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC))  # pinned, so no expiry
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, None)
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "peers").mkdir(exist_ok=True)
        key_path.unlink(missing_ok=True)
        with os.fdopen(os.open(key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        pub_path.write_bytes(certificate.public_bytes(Encoding.PEM))
    except OSError as error:
        raise IdentityError(f"cannot write {key_path}: {error.strerror}") from error
    return key_path, pub_path, fingerprint(certificate.public_bytes(Encoding.DER))


@final
@dataclass(frozen=True, slots=True)
class Context:
    """A TLS context, whom it trusts, and as which operator's machine."""

    tls: ssl.SSLContext
    peers: Peers
    operator: str
    pub: Path


def load(key: Path | None, peers: Path | None, *, server: bool, operator: str = "") -> Context:
    """Read this side's key pair and the certificates of its peers.

    Args:
        key: Private key file, with its certificate beside it; None for the one in `home`.
        peers: A certificate or a folder, see `tempo.wire.peers`; None for ``peers`` in `home`.
        server: For the worker's end of the connection.
        operator: Whose machine is to be at the other end; no particular one's by default.

    Raises:
        IdentityError: Something is missing, unreadable, or readable by others.
    """
    key = key or home() / "identity.key"
    pub = key.with_suffix(".pub")
    advice = f"run `tempo keygen {key.stem} --dir {key.parent}`"
    try:
        if key.stat().st_mode & 0o077:
            raise IdentityError(f"private key {key} can be read by others: run `chmod 600 {key}`")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(pub, key)
        if server:
            context.num_tickets = 0  # no resumption: every connection shows its certificate
    except FileNotFoundError as error:
        missing = key if not key.exists() else pub
        raise IdentityError(f"there is no {missing}: {advice}") from error
    except (OSError, ValueError) as error:
        raise IdentityError(f"key pair {key}, {pub} cannot be used ({error}): {advice} --force") from error
    who = "trusted processes that may connect" if server else "workers to connect to"
    known = trusted.read(peers or home() / "peers", who)
    if not known.of(operator):
        places = " or ".join(dict.fromkeys(map(str, (known.place(operator), known.path / operator))))
        raise IdentityError(f"no .pub files in {places}: put those of the {who} there")
    # A worker is judged after the handshake, all operators' certificates being known: so the error can say whose it is.
    accepted = known.of("") if server else frozenset().union(*known.certificates.values())
    context.load_verify_locations(cadata=b"".join(accepted))
    return Context(context, known, operator, pub)


def connect(sock: socket.socket, context: Context, timeout: float) -> ssl.SSLSocket:
    """The trusted side's handshake.

    Raises:
        IdentityError: The worker's certificate is not one of its operator's.
        OSError: The handshake failed otherwise.
    """
    sock.settimeout(timeout)
    try:
        tls = context.tls.wrap_socket(sock)
    except ssl.SSLCertVerificationError as error:
        raise IdentityError(context.peers.mistaken(b"", context.operator)) from error
    return _check_pinned(tls, context)


def accept(sock: socket.socket, context: Context, timeout: float) -> ssl.SSLSocket:
    """The worker's handshake.

    Raises:
        IdentityError: The trusted side's certificate is not one of the pinned.
        OSError: The handshake failed otherwise.
    """
    sock.settimeout(timeout)
    tls = context.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
    try:
        tls.do_handshake()
    except ssl.SSLCertVerificationError as error:
        _let_it_read_the_alert(tls)
        raise IdentityError(context.peers.mistaken(b"", "")) from error
    except OSError:
        tls.close()
        raise
    return _check_pinned(tls, context)


def _check_pinned(tls: ssl.SSLSocket, context: Context) -> ssl.SSLSocket:
    if why := context.peers.mistaken(tls.getpeercert(binary_form=True) or b"", context.operator):
        tls.close()
        raise IdentityError(why)
    return tls


def _let_it_read_the_alert(tls: ssl.SSLSocket) -> None:
    """Close so that the alert arrives: closing over unread data would reset the connection and drop it."""
    raw = socket.socket(fileno=tls.detach())
    try:
        raw.settimeout(2.0)
        raw.shutdown(socket.SHUT_WR)
        for _ in range(64):
            if not raw.recv(4096):
                break
    except OSError:
        return
    finally:
        raw.close()

"""Connecting to a worker: Unix socket, TCP with TLS, or TCP in clear where that was asked for."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import final

from tempo.errors import IdentityError, ProtocolError, WorkerRefusedError, WorkerUnreachableError
from tempo.settings import Settings
from tempo.wire import identity
from tempo.wire.address import Address
from tempo.wire.sealed import leave_tls
from tempo.wire.stream import SocketStream, Stream


@final
@dataclass(frozen=True, slots=True)
class Dialled:
    """A connection.

    Attributes:
        stream: To whoever answered.
        unbound: Why that may be a worker of another operator, and what to do; empty where it cannot.
        hint: What is likely wrong if the worker hangs up before it said anything.
    """

    stream: Stream
    unbound: str = ""
    hint: str = ""


def dial(address: Address, settings: Settings) -> Dialled:
    """Connect.

    Raises:
        WorkerUnreachableError: Nobody answers there.
        WorkerRefusedError: It does not trust our certificate, or speaks another protocol.
        IdentityError: We have no key pair, or its certificate is not one of its operator's.
    """
    timeout = settings.connect_timeout
    if address.path:
        return Dialled(SocketStream(_open(address, timeout), timeout))
    if settings.insecure_no_tls:
        return Dialled(
            SocketStream(_open(address, timeout), timeout),
            unbound="without TLS anyone may answer there: leave out insecure_no_tls",
            hint=": it may want TLS, so leave out insecure_no_tls",
        )
    key, peers, operator = settings.identity, settings.peers, address.operator
    context = identity.load(Path(key) if key else None, Path(peers) if peers else None, server=False, operator=operator)
    sock = _open(address, timeout)
    try:
        tls = identity.connect(sock, context, timeout)
    except IdentityError as error:
        raise IdentityError(f"worker {address}: {error}") from error
    except OSError as error:
        raise WorkerRefusedError(
            f"worker {address} did not complete the TLS handshake ({error}): "
            "was it started with --insecure-no-tls, or is something else listening there?"
        ) from error
    finally:
        sock.close()  # nothing to close after success: the TLS socket took the descriptor over
    try:
        return Dialled(leave_tls(tls, server=False, timeout=timeout), unbound=context.peers.unbound(operator))
    except ProtocolError as error:
        raise WorkerRefusedError(f"worker {address}: {error}") from error
    except TimeoutError as error:
        raise WorkerUnreachableError(f"worker {address} said nothing after the TLS handshake: {error}") from error
    except OSError as error:  # under TLS 1.3 the client is through with the handshake before it is judged
        raise WorkerRefusedError(
            f"worker {address} ended the connection after the TLS handshake ({error}): "
            f"it does not trust this certificate: copy {context.pub} into its peers folder"
        ) from error


def _open(address: Address, timeout: float) -> socket.socket:
    try:
        if not address.path:
            return socket.create_connection((address.host, address.port), timeout)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(address.path)
        except OSError:
            sock.close()
            raise
        return sock
    except socket.gaierror as error:
        raise WorkerUnreachableError(f"worker {address}: the host name {address.host!r} is not known") from error
    except (ConnectionRefusedError, FileNotFoundError) as error:
        listen = f"unix:{address.path}" if address.path else f"{address.host}:{address.port}"
        raise WorkerUnreachableError(
            f"worker {address}: nothing listens there; start it with `tempo worker --listen {listen}`"
        ) from error
    except OSError as error:
        raise WorkerUnreachableError(
            f"worker {address} cannot be reached ({error.strerror or error}): check the address, and firewalls between"
        ) from error

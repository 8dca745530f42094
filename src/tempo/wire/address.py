"""Worker addresses: ``[group:]host:port[@operator]`` or ``unix:path[@operator]``, IPv6 in brackets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from tempo.errors import AddressError

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_TCP = re.compile(
    rf"(?:(?P<group>{_NAME}):)?(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?)\]|(?P<host>{_NAME})):(?P<port>[0-9]{{1,5}})"
    rf"(?:@(?P<operator>{_NAME}))?"
)
_UNIX = re.compile(rf"unix:(?P<path>/[^@\0]*[^@\0/])(?:@(?P<operator>{_NAME}))?")
_ADVICE = "write [group:]host:port[@operator], such as gpu-a:7070 or [fe80::1]:7070@acme, or unix:/path[@operator]"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a worker listens, and who runs it: workers of one operator are assumed to collude."""

    group: str = ""
    host: str = ""
    port: int = 0
    operator: str = ""
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``text``; the operator defaults to the host, or to ``local`` for a Unix socket.

        Raises:
            AddressError: ``text`` does not follow the grammar.
        """
        if match := _UNIX.fullmatch(text):
            return cls(path=match["path"], operator=match["operator"] or "local")
        if match := _TCP.fullmatch(text):
            host, port = match["v6"] or match["host"], int(match["port"])
            if port > 65535:
                raise AddressError(f"address {text!r}: there is no port {port}; the largest is 65535")
            return cls(group=match["group"] or "", host=host, port=port, operator=match["operator"] or host)
        if re.fullmatch(_NAME, text):
            raise AddressError(f"address {text!r} names no port; try {text}:7070")
        if text.startswith("unix:"):
            raise AddressError(f"address {text!r}: a Unix socket needs an absolute path, as in unix:/run/tempo.sock")
        raise AddressError(f"address {text!r} is not understood; {_ADVICE}")

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}" + (f"@{self.operator}" if self.operator != "local" else "")
        host = f"[{self.host}]" if ":" in self.host else self.host
        group = f"{self.group}:" if self.group else ""
        return f"{group}{host}:{self.port}" + (f"@{self.operator}" if self.operator != self.host else "")

"""Whose certificates are trusted: ``*.pub`` files in a folder, and whose workers they are, by folders in it.

::

    peers/gpu-a.pub        may be shown at any address of an operator that has no folder
    peers/one/gpu-b.pub    may be shown at addresses of operator ``one``, where no other may

So nobody stands in for an operator that has a folder. A file may lie in both places, but not in two operators'. Whoever
connects to this machine has no operator: their certificates lie in ``peers`` itself.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Final, final

from tempo.errors import IdentityError

_PEM: Final = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


@final
@dataclass(frozen=True, slots=True)
class Peers:
    """Trusted certificates.

    Attributes:
        path: The file or folder that they were read from.
        certificates: DER, by operator; those of none are under ``""``.
    """

    path: Path
    certificates: Mapping[str, frozenset[bytes]]

    def place(self, operator: str) -> Path:
        """Where those lie that may be shown for ``operator``."""
        return self.path / operator if operator in self.certificates else self.path

    def of(self, operator: str) -> frozenset[bytes]:
        """What may be shown for ``operator``; none was given: ``""``."""
        return self.certificates.get(operator, self.certificates[""])

    def unbound(self, operator: str) -> str:
        """Why another operator's worker could answer for ``operator``, and what to do; empty if none can."""
        if operator in self.certificates:
            return ""
        if not self.path.is_dir():
            return f"{self.path} is one file, for all operators: give a folder as peers, with a folder for each of them"
        folder = self.path / operator
        return (
            f"nothing says which certificates are those of operator {operator!r}: make the folder {folder} and copy "
            "the .pub files of its machines there"
        )

    def mistaken(self, certificate: bytes, operator: str) -> str:
        """Why ``certificate`` (empty: none of these) may not be shown for ``operator``, what to do; empty if it may."""
        if certificate in self.of(operator):
            return ""
        whose = max((name for name, found in self.certificates.items() if certificate in found), default=None)
        if whose is None:
            return f"its certificate is not among {self.place(operator)}: copy its .pub file there to trust it"
        if whose:
            return (
                f"it showed a certificate of operator {whose!r} ({self.path / whose}), not of {operator!r}: "
                f"if {whose!r} runs it, write @{whose} after its address; if not, it stands in for another worker"
            )
        return (
            f"it showed a certificate that lies in {self.path}, not among those of operator {operator!r} in "
            f"{self.place(operator)}: if {operator!r} runs it, copy its .pub file there; if not, it stands in for "
            "another worker"
        )


def read(path: Path, who: str) -> Peers:
    """Read a certificate, or a folder of ``*.pub`` files and of operators' folders of such files.

    Args:
        path: The file or folder.
        who: Whose they should be, for errors.

    Raises:
        IdentityError: Something is missing, unreadable or damaged, or a certificate is of two operators.
    """
    try:
        if path.is_dir():
            folders = {folder.name: folder for folder in sorted(path.iterdir()) if folder.is_dir()}
            files = {name: sorted(folder.glob("*.pub")) for name, folder in {"": path, **folders}.items()}
        else:
            files = {"": [path]}
        texts = {name: [(file, file.read_text(encoding="ascii")) for file in found] for name, found in files.items()}
    except FileNotFoundError as error:
        raise IdentityError(f"there is no {path}: put the .pub files of the {who} there") from error
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(f"peers in {path} cannot be read: {error}") from error
    found = {name: frozenset(der for file in files for der in _certificates(*file)) for name, files in texts.items()}
    for one, other in combinations(sorted(found.keys() - {""}), 2):
        if found[one] & found[other]:
            raise IdentityError(
                f"{path / one} and {path / other} hold the same certificate, so that one operator could stand in for "
                "the other: each needs a key pair of its own (`tempo keygen`)"
            )
    return Peers(path, found)


def _certificates(file: Path, text: str) -> list[bytes]:
    found = _PEM.findall(text)
    if not found:
        raise IdentityError(f"{file} holds no certificate: it should be a .pub file made by `tempo keygen`")
    try:
        return [ssl.PEM_cert_to_DER_cert(pem) for pem in found]
    except ValueError as error:
        raise IdentityError(f"{file} is damaged: {error}") from error

"""Masking schemes: one file and one line here for each."""

from __future__ import annotations

from tempo.errors import SettingsError, nearest
from tempo.schemes.base import Scheme
from tempo.schemes.insecure_plain import InsecurePlain
from tempo.schemes.tempo import Tempo

REGISTRY: dict[str, type[Scheme]] = {
    scheme.name: scheme
    for scheme in (
        InsecurePlain,
        Tempo,
    )
}


def names() -> list[str]:
    """Names of all schemes."""
    return sorted(REGISTRY)


def create(name: str) -> Scheme:
    """The scheme called ``name``.

    Raises:
        SettingsError: There is none; the nearest name is suggested.
    """
    if name not in REGISTRY:
        raise SettingsError(f"unknown scheme {name!r}; {nearest(name, REGISTRY)}")
    return REGISTRY[name]()

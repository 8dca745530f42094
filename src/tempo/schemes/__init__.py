"""Masking schemes: one file and one line here for each."""

from __future__ import annotations

from tempo.errors import SettingsError, nearest
from tempo.schemes.base import Scheme
from tempo.schemes.insecure_plain import InsecurePlain
from tempo.schemes.mix import Mix
from tempo.schemes.mix_tuned import MixTuned
from tempo.schemes.split import Split
from tempo.schemes.tempo import Tempo
from tempo.schemes.tempo_signed import TempoSigned
from tempo.settings import Settings

REGISTRY: dict[str, type[Scheme]] = {
    scheme.name: scheme
    for scheme in (
        InsecurePlain,
        Tempo,
        TempoSigned,
        Mix,
        MixTuned,
        Split,
    )
}


def names() -> list[str]:
    """Names of all schemes."""
    return sorted(REGISTRY)


def create(name: str, settings: Settings | None = None) -> Scheme:
    """The scheme called ``name``, as ``settings`` (or their defaults) ask for it.

    Raises:
        SettingsError: There is none; the nearest name is suggested.
        UnsafeError: The settings would undo it.
    """
    if name not in REGISTRY:
        raise SettingsError(f"unknown scheme {name!r}; {nearest(name, REGISTRY)}")
    return REGISTRY[name].from_settings(settings or Settings())

"""What the trusted side takes, per byte and per FLOP of attention: read from a benchmark, or measured here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from tempo.bench.measure import Measurement, measure
from tempo.errors import SettingsError
from tempo.settings import Settings

_MAKE = "tempo bench --model llama-1b --scheme split --no-real --json FILE makes one"


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one core of the trusted side."""

    per_byte: float
    """On the wire, in either direction: masks, checks, adapters, norms, activations, and all else but attention."""
    per_attention_flop: float
    """Forward and backward."""
    measured: str
    """On what."""
    machine: dict[str, str]


def of(measurement: Measurement) -> Rates:
    """The rates in a benchmark.

    Raises:
        SettingsError: It is not of LoRA under scheme `split`.
    """
    rest = measurement.trusted_step - measurement.attention_seconds
    size = measurement.bytes_up + measurement.bytes_down
    if measurement.scheme != "split" or measurement.attention_flops <= 0 or measurement.attention_seconds <= 0:
        raise SettingsError(
            f"plan: {measurement.model} under {measurement.scheme!r} is not LoRA under 'split': {_MAKE}"
        )
    if rest <= 0 or size <= 0:
        raise SettingsError(f"plan: {measurement.model} has no time besides attention, or no bytes: {_MAKE}")
    return Rates(
        per_byte=rest / size,
        per_attention_flop=measurement.attention_seconds / measurement.attention_flops,
        measured=measurement.description,
        machine=measurement.machine,
    )


def read(path: Path) -> Rates:
    """The rates in a file of ``tempo bench --json``: those of its first measurement under scheme `split`.

    Raises:
        SettingsError: There is none in it.
    """
    if not path.is_file():
        raise SettingsError(f"plan: there is no file {path}: {_MAKE}")
    try:
        found = msgspec.json.decode(path.read_bytes(), type=list[Measurement])
    except msgspec.DecodeError as error:
        raise SettingsError(f"plan: {path} is not what tempo bench writes: {error}") from None
    measurement = next((m for m in found if m.scheme == "split"), None)
    if measurement is None:
        raise SettingsError(f"plan: {path} has no measurement under scheme 'split': {_MAKE}")
    return of(measurement)


def here(report: Callable[[str], None]) -> Rates:
    """Measured now, on a small block; some seconds."""
    settings = Settings(scheme="split", base="public", placement="all")
    return of(measure("llama-small", settings, 3, report, real=False))

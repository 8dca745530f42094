"""GPUs that one can rent, by what their maker publishes; links; and workers that one has, as measured."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Arithmetic = Literal["float64", "int8", "as measured"]
"""How a worker multiplies residues exactly: in float64, or by limbs of 8 bits; see `tempo.worker.modular`."""


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """Between the trusted side and all workers together."""

    up: float
    """Gbit/s to workers."""
    down: float
    """Gbit/s from them, at the same time."""
    latency: float
    """Seconds of the least request and its answer."""


class Workers(msgspec.Struct, frozen=True, kw_only=True):
    """Workers that one has, one of each operator, as seen from here for one model: `tempo.plan.probe`."""

    name: str
    memory_gib: float
    """The least that one of them offers."""
    token_seconds: float
    """Of a token, through all products of the model that they were measured for, at the slowest, all being at work."""
    link: Link
    hour: float = 0.0
    """Dollars for one."""


class GPU(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU. Rates are peaks of dense products."""

    name: str
    memory_gib: float
    float64: float
    """Operations a second, on tensor cores where it has any for it."""
    int8: float
    hour: float
    """Dollars: an assumption."""


GPUS: Final = {
    "rtx-4090": GPU(name="RTX 4090", memory_gib=24, float64=1.29e12, int8=660.6e12, hour=0.40),
    "a100": GPU(name="A100 80GB", memory_gib=80, float64=19.5e12, int8=624e12, hour=1.30),
    "h100": GPU(name="H100 80GB", memory_gib=80, float64=67e12, int8=1979e12, hour=2.50),
}
"""A100 and H100 on SXM, by NVIDIA's data sheets (int8 of the latter is half of what it gives with sparsity); RTX 4090
by the white paper on its architecture, Ada (float64 is a 64th of float32)."""

"""The formulas of docs/plan.md: seconds of a token on each part, and what follows from them."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from tempo.plan.hardware import GPU, Arithmetic
from tempo.plan.models import Shape
from tempo.plan.rates import Rates

ELEMENT: Final = 4
"""Bytes of a residue."""
_LIMBS: Final = 4
"""Of a residue, of 8 bits; a weight has one or two."""
_MOST_BITS: Final = 15
"""Of a weight in limbs."""

Bottleneck = Literal["trusted cores", "wire", "GPU"]
Price = Annotated[float, Meta(ge=0, le=1e6)]


class Assumptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is not measured."""

    sequence: Annotated[int, Meta(ge=1, le=1 << 24)] = 1024
    """Tokens in a sequence, all of which count."""
    cores: Annotated[int, Meta(ge=1, le=1 << 16)] = 16
    """Of the trusted side."""
    colluders: Annotated[int, Meta(ge=1, le=15)] = 1
    weight_bits: Annotated[int, Meta(ge=4, le=16)] = 12
    utilisation: Annotated[float, Meta(gt=0, le=1)] = 0.25
    """Share of a GPU's peak that is reached, reductions mod p included."""
    memory_share: Annotated[float, Meta(gt=0, le=1)] = 0.9
    """Of a GPU's memory, that weights may take."""
    core_hour: Price = 0.05
    """Dollars for one trusted core."""
    gigabyte: Price = 0.0
    """Dollars for a gigabyte that travels, either way."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a run takes with one kind of GPU and one link.

    "Overlapped" is all parts at work at once, the bound; "in turn" is one after the other. A real run lies between.
    """

    gpu: str
    link: float
    """Gbit/s of the trusted side, each way at once."""
    operators: int
    gpus_per_operator: int
    """As many as hold the weights; those of one operator take turns."""
    weight_bytes: int
    """That each operator holds."""
    bytes_up: int
    """Per token, to all workers."""
    bytes_down: int
    trusted_seconds: float
    """Per token, of one core."""
    attention_seconds: float
    """Of these."""
    wire_seconds: float
    """Per token, with both directions at once."""
    gpu_seconds: float
    """Per token, of the GPUs of one operator; operators work at the same time."""
    arithmetic: Arithmetic
    """By which they are faster."""
    tokens_per_second: float
    """Overlapped."""
    bottleneck: Bottleneck
    tokens_per_second_in_turn: float
    cores_needed: int
    """So that the trusted side does not hold up wire and GPU, overlapped."""
    cost: float
    """Dollars per million tokens, overlapped."""
    cost_in_turn: float


def peak_seconds(shape: Shape, gpu: GPU, bits: int) -> dict[Arithmetic, float]:
    """Per token at the peak of each arithmetic: two products with every weight, forward and backward."""
    seconds: dict[Arithmetic, float] = {"float64": 4 * shape.weights / gpu.float64}
    if bits <= _MOST_BITS:
        seconds["int8"] = 4 * shape.weights * _LIMBS * ceil(bits / 8) / gpu.int8
    return seconds


def attention_flops(shape: Shape, sequence: int) -> int:
    """Per token, forward and backward, of causal attention: seven products of a length's square, halved."""
    return 7 * sequence * shape.attention_width * shape.num_hidden_layers


def estimate(shape: Shape, gpu: GPU, link: float, rates: Rates, assumed: Assumptions) -> Estimate:
    """What LoRA of a model of that shape takes.

    Args:
        shape: Of the model.
        gpu: That every worker has.
        link: Gbit/s of the trusted side, each way at once.
        rates: Of the trusted side.
        assumed: All else.
    """
    operators = assumed.colluders + 1
    weight_bytes = shape.weights * (1 if assumed.weight_bits <= 8 else 2)
    gpus = ceil(weight_bytes / (assumed.memory_share * gpu.memory_gib * 2**30))
    up = ELEMENT * shape.features
    down = operators * up
    attention = attention_flops(shape, assumed.sequence) * rates.per_attention_flop
    trusted = (up + down) * rates.per_byte + attention
    ways = peak_seconds(shape, gpu, assumed.weight_bits)
    arithmetic = min(ways, key=ways.__getitem__)
    bits_per_second = link * 1e9
    parts: dict[Bottleneck, float] = {
        "trusted cores": trusted / assumed.cores,
        "wire": 8 * max(up, down) / bits_per_second,
        "GPU": ways[arithmetic] / assumed.utilisation,
    }
    bottleneck = max(parts, key=parts.__getitem__)
    overlapped = parts[bottleneck]
    in_turn = parts["trusted cores"] + 8 * (up + down) / bits_per_second + parts["GPU"]
    hour = operators * gpus * gpu.hour + assumed.cores * assumed.core_hour
    traffic = (up + down) / 1e9 * assumed.gigabyte
    return Estimate(
        gpu=gpu.name,
        link=link,
        operators=operators,
        gpus_per_operator=gpus,
        weight_bytes=weight_bytes,
        bytes_up=up,
        bytes_down=down,
        trusted_seconds=trusted,
        attention_seconds=attention,
        wire_seconds=parts["wire"],
        gpu_seconds=parts["GPU"],
        arithmetic=arithmetic,
        tokens_per_second=1 / overlapped,
        bottleneck=bottleneck,
        tokens_per_second_in_turn=1 / in_turn,
        cores_needed=ceil(trusted / max(parts["wire"], parts["GPU"])),
        cost=1e6 * (overlapped / 3600 * hour + traffic),
        cost_in_turn=1e6 * (in_turn / 3600 * hour + traffic),
    )

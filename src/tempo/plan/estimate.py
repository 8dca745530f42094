"""The formulas of docs/plan.md: seconds of a token on each part, and what follows from them."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from tempo.plan.hardware import GPU, Arithmetic, Link, Workers
from tempo.plan.models import Shape
from tempo.plan.rates import Rates

ELEMENT: Final = 4
"""Bytes of a residue."""
_LIMBS: Final = 4
"""Of a residue, of 8 bits; a weight has one or two."""
_MOST_BITS: Final = 15
"""Of a weight in limbs."""

Bottleneck = Literal["trusted cores", "wire", "workers"]
Price = Annotated[float, Meta(ge=0, le=1e6)]


class Assumptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is not measured."""

    sequence: Annotated[int, Meta(ge=1, le=1 << 24)] = 1024
    """Tokens in a sequence, all of which count."""
    batch: Annotated[int, Meta(ge=1, le=1 << 30)] = 8192
    """Tokens that go through the model together."""
    cores: Annotated[int, Meta(ge=1, le=1 << 16)] = 16
    """Of the trusted side."""
    colluders: Annotated[int, Meta(ge=1, le=15)] = 1
    weight_bits: Annotated[int, Meta(ge=4, le=16)] = 9
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

    "Overlapped" is all parts at work at once, the bound; "in turn" is one after the other, as a single batch goes.
    """

    worker: str
    link: Link
    operators: int
    workers_per_operator: int
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
    wire_seconds_in_turn: float
    """Per token, one direction after the other, latency included."""
    worker_seconds: float
    """Per token, of the workers of one operator; operators work at the same time."""
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


def worker_seconds(shape: Shape, worker: GPU | Workers, assumed: Assumptions) -> tuple[float, Arithmetic]:
    """Per token, and by which arithmetic."""
    if isinstance(worker, Workers):
        return worker.token_seconds, "as measured"
    ways = peak_seconds(shape, worker, assumed.weight_bits)
    arithmetic = min(ways, key=ways.__getitem__)
    return ways[arithmetic] / assumed.utilisation, arithmetic


def peak_seconds(shape: Shape, gpu: GPU, bits: int) -> dict[Arithmetic, float]:
    """Per token at the peak of each arithmetic: two operations for each multiplication."""
    operations = 2 * shape.multiplications
    seconds: dict[Arithmetic, float] = {"float64": operations / gpu.float64}
    if bits <= _MOST_BITS:
        seconds["int8"] = operations * _LIMBS * ceil(bits / 8) / gpu.int8
    return seconds


def attention_flops(shape: Shape, sequence: int) -> int:
    """Per token, forward and backward, of causal attention: seven products of a length's square, halved."""
    return 7 * sequence * shape.attention_width * shape.num_hidden_layers


def estimate(shape: Shape, worker: GPU | Workers, link: Link, rates: Rates, assumed: Assumptions) -> Estimate:
    """What LoRA of a model of that shape takes.

    Args:
        shape: Of the model.
        worker: Each operator's.
        link: Of the trusted side.
        rates: Of the trusted side.
        assumed: All else.
    """
    operators = assumed.colluders + 1
    weight_bytes = shape.weights * (1 if assumed.weight_bits <= 8 else 2)
    workers = ceil(weight_bytes / (assumed.memory_share * worker.memory_gib * 2**30))
    up, down = ELEMENT * shape.sent, ELEMENT * operators * shape.received
    attention = attention_flops(shape, assumed.sequence) * rates.per_attention_flop
    trusted = (up + down) * rates.per_byte + attention
    computing, arithmetic = worker_seconds(shape, worker, assumed)
    sending, receiving = 8e-9 * up / link.up, 8e-9 * down / link.down
    waiting = (len(shape.products) + len(shape.backward)) * link.latency / assumed.batch
    parts: dict[Bottleneck, float] = {
        "trusted cores": trusted / assumed.cores,
        "wire": max(sending, receiving),
        "workers": computing,
    }
    bottleneck = max(parts, key=parts.__getitem__)
    overlapped = parts[bottleneck]
    in_turn = parts["trusted cores"] + sending + receiving + waiting + computing
    hour = operators * workers * worker.hour + assumed.cores * assumed.core_hour
    traffic = (up + down) / 1e9 * assumed.gigabyte
    return Estimate(
        worker=worker.name,
        link=link,
        operators=operators,
        workers_per_operator=workers,
        weight_bytes=weight_bytes,
        bytes_up=up,
        bytes_down=down,
        trusted_seconds=trusted,
        attention_seconds=attention,
        wire_seconds=parts["wire"],
        wire_seconds_in_turn=sending + receiving + waiting,
        worker_seconds=computing,
        arithmetic=arithmetic,
        tokens_per_second=1 / overlapped,
        bottleneck=bottleneck,
        tokens_per_second_in_turn=1 / in_turn,
        cores_needed=ceil(trusted / max(parts["wire"], parts["workers"])),
        cost=1e6 * (overlapped / 3600 * hour + traffic),
        cost_in_turn=1e6 * (in_turn / 3600 * hour + traffic),
    )

"""Frames: what is sent arrives, and nothing else is accepted."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import msgpack
from msgspec.structs import replace

from tempo.errors import ProtocolError
from tempo.wire.frame import (
    HEADER_LIMIT,
    MAGIC,
    PAYLOAD_LIMIT,
    PREFIX,
    TO_TRUSTED,
    TO_WORKER,
    decode,
    encode,
    parse_prefix,
)
from tempo.wire.messages import (
    Adam,
    Backward,
    Conv,
    Failure,
    Fetch,
    Forget,
    Forward,
    Hello,
    Linear,
    Lion,
    Muon,
    Result,
    Sgd,
    Store,
    TensorRef,
    Update,
)

X = TensorRef("x", "float32", (4, 8))
FORWARD = Forward(id=1, step=0, layer=2, weight=3, operand=4, product=Linear(), tensors=(X,))
CONV = Conv((1, 1), (0, 0), (1, 1), 1)
RULES = [
    Sgd(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=True, maximize=False),
    Adam(0.1, 0.9, 0.99, 1e-8, 0.0, decoupled=True, amsgrad=False, maximize=False, steps=7),
    Lion(0.1, 0.9, 0.99, 0.0),
    Muon(0.1, 0.2, 0.0, 0.9, nesterov=True, coefficients=(3.0, -4.0, 2.0), eps=1e-7, iterations=5),
]
MESSAGES = [
    Hello(1, "0.1.0", "0" * 16, ("shm",)),
    Store(id=1, step=0, layer=1, weight=1, tensors=(X,)),
    FORWARD,
    Backward(id=9, step=1, layer=2, weight=3, operand=4, product=CONV, wants=(X, replace(X, name="dw"))),
    Backward(id=9, step=1, layer=2, weight=3, operand=4, product=Linear(), accumulate=True),
    *(Update(id=9, step=1, layer=2, weight=3, rule=rule, scale=0.5) for rule in RULES),
    Fetch(id=9, step=1, layer=2, weight=3, wants=(X, TensorRef("norm", "float64", (1,)))),
    Forget((1, 2), (3,), (4, 5)),
]


def check(header: bytes, payload: int, segments: dict[int, int] | None = None) -> object:
    return decode(TO_WORKER, header, payload, None if segments is None else lambda number: segments.get(number, 0))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_arrive_as_they_were_sent(message: Forward) -> None:
    frame = encode(message)
    length, payload = parse_prefix(frame[: PREFIX.size])
    assert length == len(frame) - PREFIX.size
    assert check(frame[PREFIX.size :], payload) == message


@pytest.mark.parametrize(
    ("prefix", "why"),
    [
        (PREFIX.pack(b"HTTP", 10, 0), "is the other end Tempo"),
        (PREFIX.pack(MAGIC, 0, 0), "header of 0"),
        (PREFIX.pack(MAGIC, HEADER_LIMIT + 1, 0), "header of 65537"),
        (PREFIX.pack(MAGIC, 10, PAYLOAD_LIMIT + 1), "payload"),
    ],
)
def test_a_bad_prefix_is_refused(prefix: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        parse_prefix(prefix)


@pytest.mark.parametrize(
    ("message", "payload", "segments", "why"),
    [
        (FORWARD, 127, None, "its tensors have 128"),
        (FORWARD, 129, None, "its tensors have 128"),
        (replace(FORWARD, tensors=(X, X)), 256, None, "twice"),
        (replace(FORWARD, wants=(X, X)), 128, None, "twice"),
        (replace(FORWARD, tensors=(replace(X, segment=0),)), 0, None, "without any"),
        (replace(FORWARD, wants=(replace(X, segment=0),)), 128, None, "without any"),
        (replace(FORWARD, tensors=(replace(X, segment=1),)), 0, {0: 4096}, "outside segment 1"),
        (replace(FORWARD, tensors=(replace(X, segment=0, offset=4096 - 64),)), 0, {0: 4096}, "outside segment 0"),
        (replace(FORWARD, tensors=(replace(X, segment=0, offset=32),)), 0, {0: 4096}, "aligned"),
        (replace(FORWARD, tensors=(replace(X, offset=64),)), 128, {0: 4096}, "inline"),
        (replace(FORWARD, tensors=(replace(X, shape=(1 << 40, 1 << 40)),)), 0, None, "limit"),
        (replace(FORWARD, wants=(replace(X, shape=(1 << 40, 2)),)), 128, None, "limit"),
        (Result(1, 0, ()), 0, None, "schema"),  # the wrong way round
        (Failure(1, "failed", ""), 0, None, "schema"),
    ],
)
def test_references_that_do_not_fit_are_refused(message: Forward, payload: int, segments: object, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        check(msgpack.encode(message), payload, segments)


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "eval"},
        {"id": -1},
        {"id": 1 << 63},
        {"id": "1"},
        {"id": 1.0},
        {"product": {"type": "attention"}},
        {"unknown": 1},
        {"tensors": [{"name": "X", "dtype": "float32", "shape": [1]}]},
        {"tensors": [{"name": "x\n", "dtype": "float32", "shape": [1]}]},
        {"tensors": [{"name": "x", "dtype": "object", "shape": [1]}]},
        {"tensors": [{"name": "x", "dtype": "float32", "shape": [-1]}]},
        {"tensors": [{"name": "x", "dtype": "float32", "shape": [1] * 7}]},
        {"tensors": [{"name": "x", "dtype": "float32", "shape": [1], "segment": -2}]},
    ],
    ids=str,
)
def test_the_schema_is_strict(changes: dict[str, object]) -> None:
    header = {**msgpack.decode(msgpack.encode(FORWARD)), **changes}
    with pytest.raises(ProtocolError, match="schema"):
        check(msgpack.encode(header), 128)


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "rmsprop"},
        {"type": "sgd"},  # with fields of another
        {"lr": "0.1"},
        {"lr": None},
        {"iterations": 100},
        {"iterations": -1},
        {"coefficients": [1.0, 2.0]},
        {"nesterov": 1},
        {"closure": "import os"},
    ],
    ids=str,
)
def test_the_schema_of_rules_is_strict(changes: dict[str, object]) -> None:
    header = msgpack.decode(msgpack.encode(Update(id=1, step=0, layer=0, weight=1, rule=RULES[-1])))
    header["rule"] |= changes
    with pytest.raises(ProtocolError, match="schema"):
        check(msgpack.encode(header), 0)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(header: bytes) -> None:
    for decoder in TO_WORKER, TO_TRUSTED:
        with contextlib.suppress(ProtocolError):
            decode(decoder, header, 0, None)


def test_deep_nesting_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        check(b"\x91" * 60_000, 0)

"""Frames: a fixed prefix, a msgpack header, the bytes of the inline tensors.

``magic "TMP1" · header length u32 · payload length u64 · header · payload``, little endian. Everything is checked
before anything is allocated for it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from tempo.errors import ProtocolError
from tempo.wire.memory import ALIGNMENT
from tempo.wire.messages import TensorRef, ToTrusted, ToWorker
from tempo.wire.tensors import PACKED, size_of

MAGIC: Final = b"TMP1"
PREFIX: Final = struct.Struct("<4sIQ")
HEADER_LIMIT: Final = 64 << 10
PAYLOAD_LIMIT: Final = 1 << 40

TO_WORKER: Final[msgspec.msgpack.Decoder[ToWorker]] = msgspec.msgpack.Decoder(ToWorker)
TO_TRUSTED: Final[msgspec.msgpack.Decoder[ToTrusted]] = msgspec.msgpack.Decoder(ToTrusted)
_ENCODER: Final = msgspec.msgpack.Encoder()

M = TypeVar("M")


def encode(message: ToWorker | ToTrusted) -> bytes:
    """Prefix and header of ``message``; the bytes of its inline tensors are to follow."""
    header = _ENCODER.encode(message)
    if len(header) > HEADER_LIMIT:
        raise ValueError(f"{type(message).__name__} header of {len(header)} bytes exceeds {HEADER_LIMIT}")
    return PREFIX.pack(MAGIC, len(header), sum(map(size_of, inline(message)))) + header


def parse_prefix(prefix: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Lengths of header and payload."""
    magic, header, payload = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise ProtocolError(f"frame starts with {bytes(magic)!r} instead of {MAGIC!r}: is the other end Tempo?")
    if not 0 < header <= HEADER_LIMIT:
        raise ProtocolError(f"header of {header} bytes; the limit is {HEADER_LIMIT}")
    if payload > PAYLOAD_LIMIT:
        raise ProtocolError(f"payload of {payload} bytes; the limit is {PAYLOAD_LIMIT}")
    return header, payload


def decode(
    decoder: msgspec.msgpack.Decoder[M],
    header: bytes | bytearray | memoryview,
    payload: int,
    segment_size: Callable[[int], int] | None,
) -> M:
    """Decode a header and check every reference in it.

    Args:
        decoder: `TO_WORKER` or `TO_TRUSTED`.
        header: The bytes of the header.
        payload: The announced length of the payload.
        segment_size: Bytes of an announced segment (0 for others); None where there is no shared memory.

    Raises:
        ProtocolError: The header does not follow the schema, or its references do not fit.
    """
    try:
        message = decoder.decode(header)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"header does not follow the schema: {error}") from None
    tensors, wants = _references(message)
    for refs in tensors, wants:
        if len({ref.name for ref in refs}) != len(refs):
            raise ProtocolError(f"{type(message).__name__} names a tensor twice")
        for ref in refs:
            _check(ref, segment_size)
    if any(ref.dtype == PACKED for ref in wants):
        raise ProtocolError(f"{type(message).__name__} wants an answer as {PACKED}, in which only operands travel")
    expected = sum(size_of(ref) for ref in tensors if ref.segment < 0)
    if expected != payload:
        raise ProtocolError(f"{type(message).__name__} with {payload} bytes of payload, its tensors have {expected}")
    return message


def inline(message: ToWorker | ToTrusted) -> list[TensorRef]:
    """The tensors whose bytes follow the header."""
    return [ref for ref in _references(message)[0] if ref.segment < 0]


def _references(message: object) -> tuple[tuple[TensorRef, ...], tuple[TensorRef, ...]]:
    return getattr(message, "tensors", ()), getattr(message, "wants", ())


def _check(ref: TensorRef, segment_size: Callable[[int], int] | None) -> None:
    size = size_of(ref)
    if size > PAYLOAD_LIMIT:
        raise ProtocolError(f"tensor {ref.name!r} of {size} bytes; the limit is {PAYLOAD_LIMIT}")
    if ref.segment < 0:
        if ref.offset:
            raise ProtocolError(f"inline tensor {ref.name!r} with an offset")
    elif segment_size is None:
        raise ProtocolError(f"tensor {ref.name!r} refers to shared memory on a connection without any")
    elif ref.offset % ALIGNMENT or ref.offset + size > segment_size(ref.segment):
        raise ProtocolError(f"tensor {ref.name!r} lies outside segment {ref.segment} or is not aligned")

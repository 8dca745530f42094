"""A channel: messages and tensor bytes over a stream, checked on arrival."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, final

import msgspec

from tempo.errors import ProtocolError
from tempo.wire.frame import HEADER_LIMIT, PREFIX, M, decode, encode, parse_prefix
from tempo.wire.messages import ToTrusted, ToWorker
from tempo.wire.stream import CHUNK, Stream

Place = Callable[[M], Sequence[memoryview] | None]
"""Given a checked message, where its inline tensors go; None discards them. Raises `ProtocolError` to refuse."""

HEADER_TIMEOUT = 15.0
"""Seconds from the first byte of a prefix or header to its last: nobody who means well takes longer."""

_AHEAD = 8 << 10
"""Bytes read at once where a frame is due: enough for most headers, little enough to move twice."""


@final
class Channel(Generic[M]):
    """One end of a connection. One thread receives, any may send.

    Args:
        stream: The byte stream below.
        decoder: `frame.TO_WORKER` or `frame.TO_TRUSTED`: what may arrive.
        segment_size: Bytes of a segment of shared memory, 0 for an unknown one; None where nothing is shared.
    """

    def __init__(
        self, stream: Stream, decoder: msgspec.msgpack.Decoder[M], segment_size: Callable[[int], int] | None
    ) -> None:
        self.stream = stream
        self._decoder: msgspec.msgpack.Decoder[M] = decoder
        self._segment_size = segment_size
        self._sending = threading.Lock()
        self._buffer = memoryview(bytearray(PREFIX.size + HEADER_LIMIT + _AHEAD))
        self._begin = self._end = 0  # what was read and not yet used

    def send(
        self,
        message: ToWorker | ToTrusted,
        payload: Sequence[memoryview] = (),
        descriptor: int | None = None,
        *,
        after: Sequence[ToWorker] = (),
    ) -> None:
        """Send ``message``, then the bytes of its inline tensors, in order; ``after`` others, at once with these."""
        frames = [memoryview(encode(one)) for one in (*after, message)]
        with self._sending:
            self.stream.write([*frames, *payload], descriptor)

    def receive(self, place: Place[M]) -> M:
        """Receive one message, and its inline tensors to where ``place`` says.

        Raises:
            EOFError: The other end closed, between two frames.
            TimeoutError: Nothing came for the stream's timeout, between two frames.
            ProtocolError: The frame is malformed or incomplete, or ``place`` refused it.
        """
        if self._begin == self._end:
            self._begin = self._end = 0
            self._read_ahead()
        try:
            header_length, payload = parse_prefix(self._next(PREFIX.size))
            message = decode(self._decoder, self._next(header_length), payload, self._segment_size)
            views = place(message)
            if views is None:
                self._discard(payload)
            else:
                for view in views:
                    self._fill(view)
        except (EOFError, TimeoutError) as error:
            raise ProtocolError(f"truncated frame: {error}") from None
        return message

    def take_descriptor(self) -> int:
        """The file descriptor that came with the message just received."""
        if not self.stream.descriptors:
            raise ProtocolError("a segment was announced without its descriptor")
        return self.stream.descriptors.popleft()

    def close(self) -> None:
        """Close the stream, and descriptors that came uninvited."""
        while self.stream.descriptors:
            os.close(self.stream.descriptors.popleft())
        self.stream.close()

    def _read_ahead(self) -> None:
        count = self.stream.read_some(self._buffer[self._end : self._end + _AHEAD])
        if count == 0:
            raise EOFError("the other end closed the connection")
        self._end += count

    def _next(self, count: int) -> memoryview:
        """The next ``count`` bytes of prefix or header; valid until the next call."""
        if len(self._buffer) - self._begin < count + _AHEAD:
            left = self._end - self._begin
            self._buffer[:left] = self._buffer[self._begin : self._end]
            self._begin, self._end = 0, left
        if self._end - self._begin < count:
            deadline = time.monotonic() + HEADER_TIMEOUT
            while self._end - self._begin < count:
                self._read_ahead()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"its header took more than {HEADER_TIMEOUT:g} s")
        self._begin += count
        return self._buffer[self._begin - count : self._begin]

    def _fill(self, view: memoryview) -> None:
        ready = min(self._end - self._begin, len(view))
        view[:ready] = self._buffer[self._begin : self._begin + ready]
        self._begin += ready
        self.stream.read(view[ready:])

    def _discard(self, count: int) -> None:
        scratch = memoryview(bytearray(min(count, CHUNK)))
        while count:
            view = scratch[: min(count, CHUNK)]
            self._fill(view)
            count -= len(view)

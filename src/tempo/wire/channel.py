"""A channel: messages and tensor bytes over a stream, checked on arrival."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, final

import msgspec

from tempo.errors import ProtocolError
from tempo.wire.frame import HEADER_LIMIT, PREFIX, M, decode, encode, parse_prefix
from tempo.wire.messages import ToTrusted, ToWorker
from tempo.wire.stream import CHUNK, SocketStream, Stream

Place = Callable[[M], Sequence[memoryview] | None]
"""Given a checked message, where its inline tensors go; None discards them. Raises `ProtocolError` to refuse."""


@final
class Channel(Generic[M]):
    """One end of a connection. One thread receives, any may send.

    Args:
        stream: The byte stream below.
        decoder: `frame.TO_WORKER` or `frame.TO_TRUSTED`: what may arrive.
        segment_size: Bytes of a segment of shared memory, 0 for an unknown one; None where nothing is shared.
        descriptors: Whether file descriptors may arrive.
    """

    def __init__(
        self,
        stream: Stream,
        decoder: msgspec.msgpack.Decoder[M],
        segment_size: Callable[[int], int] | None,
        *,
        descriptors: bool = False,
    ) -> None:
        self.stream = stream
        self._segment_size = segment_size
        self._descriptors = descriptors
        self._decoder: msgspec.msgpack.Decoder[M] = decoder
        self._sending = threading.Lock()
        self._prefix = memoryview(bytearray(PREFIX.size))
        self._header = memoryview(bytearray(HEADER_LIMIT))

    def send(
        self, message: ToWorker | ToTrusted, payload: Sequence[memoryview] = (), descriptor: int | None = None
    ) -> None:
        """Send ``message``, then the bytes of its inline tensors in order."""
        frame = memoryview(encode(message))
        with self._sending:
            self.stream.write([frame, *payload], descriptor)

    def receive(self, place: Place[M]) -> M:
        """Receive one message, and its inline tensors to where ``place`` says.

        Raises:
            EOFError: The other end closed, between two frames.
            TimeoutError: Nothing came for the stream's timeout, between two frames.
            ProtocolError: The frame is malformed or incomplete, or ``place`` refused it.
        """
        begun = self._begin()
        try:
            self.stream.read(self._prefix[begun:])
            header_length, payload = parse_prefix(self._prefix)
            header = self._header[:header_length]
            self.stream.read(header)
            message = decode(self._decoder, header, payload, self._segment_size)
            views = place(message)
            if views is None:
                self._discard(payload)
            else:
                for view in views:
                    self.stream.read(view)
        except (EOFError, TimeoutError) as error:
            raise ProtocolError(f"truncated frame: {error}") from None
        return message

    def take_descriptor(self) -> int:
        """The file descriptor that came with the message just received."""
        descriptors = self.stream.descriptors if isinstance(self.stream, SocketStream) else []
        if len(descriptors) != 1:
            raise ProtocolError(f"a segment was announced with {len(descriptors)} descriptors")
        return descriptors.pop()

    def drop_descriptors(self) -> None:
        """Close descriptors that came uninvited."""
        if isinstance(self.stream, SocketStream):
            while self.stream.descriptors:
                os.close(self.stream.descriptors.pop())

    def _begin(self) -> int:
        if self._descriptors and isinstance(self.stream, SocketStream):
            count = self.stream.read_some_with_descriptors(self._prefix)
        else:
            count = self.stream.read_some(self._prefix)
        if count == 0:
            raise EOFError("the other end closed the connection")
        return count

    def _discard(self, count: int) -> None:
        scratch = memoryview(bytearray(min(count, CHUNK)))
        while count:
            view = scratch[: min(count, CHUNK)]
            self.stream.read(view)
            count -= len(view)

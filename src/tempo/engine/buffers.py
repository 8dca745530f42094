"""Where the tensors of one link lie: buffers to send from and to receive into, used again and again."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple, final

import torch
from torch import Tensor

from tempo.engine.geometry import Shape
from tempo.wire.blocks import pack, packed_size
from tempo.wire.memory import Block, BlockPool, PrivatePool
from tempo.wire.messages import TensorRef
from tempo.wire.shared import Segments, SharedPool
from tempo.wire.tensors import NAMES, PACKED


@final
class Placed(NamedTuple):
    """A tensor of a message: what names it there, where it lies, and its bytes."""

    ref: TensorRef
    block: Block
    tensor: Tensor


@final
class Buffers:
    """The buffers of a link; safe to use from several threads.

    Args:
        segments: Shared memory of the connection, where there is some.
        shared: Whether what is sent and answered lies there.
        packs: Whether operands of float32 are sent in 8 bits.
    """

    def __init__(self, segments: Segments, *, shared: bool, packs: bool) -> None:
        self._shared = shared
        self._packs = packs
        # Two pools, so that what comes back never lies where this side wrote something.
        self._outgoing: BlockPool = SharedPool(segments, answers=False) if shared else PrivatePool()
        self._incoming: BlockPool = SharedPool(segments, answers=True) if shared else PrivatePool()
        self._private = PrivatePool()
        self._lent: dict[int, tuple[BlockPool, Block]] = {}  # send buffers by address
        self._replies: dict[int, tuple[BlockPool, Block]] = {}  # replies by address

    # --- for whoever masks and reads ---

    def empty(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        """A send buffer. Write to it once, nothing but what the worker may see, and pass it to `Link.request`."""
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        pool = self._private if self._packs and dtype == torch.float32 else self._outgoing
        block, tensor = _take(pool, shape, dtype)
        self._lent[tensor.data_ptr()] = pool, block
        return tensor

    def private(self, reply: Tensor) -> Tensor | None:
        """Where to copy a reply so that its worker cannot change it any more; None if it cannot as it is.

        To be given back with `release`, like the reply itself.
        """
        if not self._shared or not reply.numel():
            return None
        block, copy = _take(self._private, tuple(reply.shape), reply.dtype)
        self._replies[copy.data_ptr()] = self._private, block
        return copy

    def release(self, tensor: Tensor) -> None:
        """Give a reply (or an unused send buffer) back; the caller must not touch it any more."""
        if reply := self._replies.pop(tensor.data_ptr(), None):
            pool, block = reply
            pool.give(block)
        elif lent := self._lent.pop(tensor.data_ptr(), None):
            pool, block = lent
            pool.give(block)

    # --- for the link ---

    def operand(self, name: str, tensor: Tensor) -> Placed:
        """Place what is to be sent: from `empty`, as it is; else, or where it is to be packed, as a copy."""
        pool, block = self._lent.pop(tensor.data_ptr(), (None, None))
        if pool is self._outgoing and block is not None and tensor.is_contiguous():
            return Placed(_reference(name, block, tensor), block, tensor)
        if self._packs and tensor.dtype == torch.float32:
            place, copy = _take(self._outgoing, (packed_size(tuple(tensor.shape)),), torch.uint8)
            pack(tensor.detach().contiguous(), copy)
            ref = TensorRef(name, PACKED, tuple(tensor.shape), place.segment, place.offset)
        else:
            place, copy = _take(self._outgoing, tuple(tensor.shape), tensor.dtype)
            copy.copy_(tensor.detach())
            ref = _reference(name, place, copy)
        if pool is not None and block is not None:
            pool.give(block)
        return Placed(ref, place, copy)

    def answer(self, name: str, shape: Shape, dtype: torch.dtype) -> Placed:
        """Room for an answer."""
        block, tensor = _take(self._incoming, shape, dtype)
        return Placed(_reference(name, block, tensor), block, tensor)

    def arrived(self, answer: Placed) -> None:
        """It is there: whoever gets it gives it back by `release`, unless it is empty."""
        if answer.tensor.numel():
            self._replies[answer.tensor.data_ptr()] = self._incoming, answer.block
        else:
            self._incoming.give(answer.block)

    def never_came(self, answer: Placed) -> None:
        """Its room is free again."""
        self._incoming.give(answer.block)

    def done_with(self, operands: Iterable[Placed]) -> None:
        """The worker reads them no more."""
        for operand in operands:
            self._outgoing.give(operand.block)

    def close(self) -> None:
        """Let go of what is shared, and of what is out."""
        self._outgoing, self._incoming = PrivatePool(), PrivatePool()
        self._lent.clear()
        self._replies.clear()


def _take(pool: BlockPool, shape: Shape, dtype: torch.dtype) -> tuple[Block, Tensor]:
    block = pool.take(prod(shape) * dtype.itemsize)
    return block, block.tensor(shape, dtype)


def _reference(name: str, block: Block, tensor: Tensor) -> TensorRef:
    return TensorRef(name, NAMES[tensor.dtype], tuple(tensor.shape), block.segment, block.offset)

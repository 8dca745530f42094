"""Where a worker computes, and how tensors get there and back.

On a GPU three things go on at once: the computing thread copies the operands of the next request up, on a stream of
their own; the GPU works on what was queued before; a second thread copies finished answers down, on a third stream, and
sends them. What is received and sent lies in pinned memory, unless both sides share it. Not yet run on a GPU:
`tests/unit/worker/test_device.py` drives the same code with memory that stands for a GPU's.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
from torch import Tensor

from tempo.wire.memory import Memory, mapping

Mark = Callable[[], None]
"""Waits until all that was queued before it is done; raises what went wrong there."""


class Device(ABC):
    """A place for tensors and arithmetic, seen from the host."""

    torch: torch.device
    queues: bool
    """Whether arithmetic has only been queued when a call returns."""

    @abstractmethod
    def allocate(self, size: int) -> Memory:
        """Host memory that is quickly copied to it and from it. Raises OSError or RuntimeError."""

    @abstractmethod
    def working(self) -> AbstractContextManager[object]:
        """A context for the thread that queues arithmetic."""

    @abstractmethod
    def upload(self, tensor: Tensor) -> Tensor:
        """``tensor`` where it can be computed with. Host memory may be used again when this returns."""

    @abstractmethod
    def room(self, out: Tensor) -> Tensor:
        """Where to compute an answer that is to end up in ``out``."""

    @abstractmethod
    def mark(self) -> Mark:
        """A mark behind all that was queued so far by this thread."""

    @abstractmethod
    def download(self, room: Tensor, out: Tensor) -> None:
        """Bring an answer that is done from its `room` to ``out``. May run on a thread of its own."""


@final
class Host(Device):
    """This process's own memory and cores: nothing is copied, nothing queued."""

    queues = False

    def __init__(self) -> None:
        self.torch = torch.device("cpu")

    def allocate(self, size: int) -> mmap.mmap:
        """Fresh pages."""
        return mapping(size)

    def working(self) -> AbstractContextManager[object]:
        """Nothing to prepare."""
        return nullcontext()

    def upload(self, tensor: Tensor) -> Tensor:
        """Itself."""
        return tensor

    def room(self, out: Tensor) -> Tensor:
        """Itself."""
        return out

    def mark(self) -> Mark:
        """Done already."""
        return _nothing

    def download(self, room: Tensor, out: Tensor) -> None:
        """It is there."""


@final
class Cuda(Device):
    """A CUDA device, with a stream each for operands, arithmetic and answers."""

    queues = True

    def __init__(self, device: torch.device) -> None:
        self.torch = device
        _settings()
        self._up, self._compute, self._down = (torch.cuda.Stream(device) for _ in range(3))

    def allocate(self, size: int) -> Memory:
        """Pinned pages: PyTorch keeps them for the next to ask, since pinning takes long."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()

    def working(self) -> AbstractContextManager[object]:
        """Its arithmetic goes to the stream for that."""
        return torch.cuda.stream(self._compute)

    def upload(self, tensor: Tensor) -> Tensor:
        """A copy, which does not wait for the arithmetic that is queued."""
        if tensor.is_cuda:
            return tensor
        with torch.cuda.stream(self._up):
            there = tensor.to(self.torch, non_blocking=True)
        # The memory was taken on one stream and is used on another: it must not be given away while that is busy.
        there.record_stream(self._compute)
        self._up.synchronize()
        return there

    def room(self, out: Tensor) -> Tensor:
        """Device memory of the same shape."""
        return torch.empty(out.shape, dtype=out.dtype, device=self.torch)

    def mark(self) -> Mark:
        """An event; who waits for it sleeps."""
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.torch))
        return event.synchronize

    def download(self, room: Tensor, out: Tensor) -> None:
        """On the stream for answers, while arithmetic goes on."""
        with torch.cuda.stream(self._down):
            out.copy_(room, non_blocking=True)
        self._down.synchronize()


def open_device(device: torch.device) -> Device:
    """The device that PyTorch calls ``device``."""
    return Host() if device.type == "cpu" else Cuda(device)


def _settings() -> None:
    """Have CUDA keep float32 as it is, and the sums of half precision in float32, until they are rounded once.

    Otherwise an honest answer may differ from what it should be by more than checks of answers tolerate. Who wants
    tensor cores sends bfloat16 (``wire_dtype``): its products are exact in them. Algorithms of convolutions are tried
    out once per shape, since shapes repeat at every step.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.benchmark = True


def _nothing() -> None:
    """Nothing to wait for."""

"""The arithmetic of a worker: products, their gradients, and where kept tensors live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from tempo.wire.layout import meant, meant_shape, sent_shape
from tempo.wire.memory import Block
from tempo.wire.messages import Conv, Linear, Product, Residues, Rule, Shape
from tempo.wire.residues import expand
from tempo.worker.budget import Account
from tempo.worker.device import Device, Host, open_device
from tempo.worker.modular import Multiplier
from tempo.worker.refusal import Refusal
from tempo.worker.turns import Turns
from tempo.worker.update import apply


@final
@dataclass(frozen=True, slots=True)
class Incoming:
    """A tensor that arrived: in a block of our own, or (``block`` None) in memory that the other side will reuse."""

    tensor: Tensor
    block: Block | None = None


@final
@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor under a number, until ``free`` is called."""

    tensor: Tensor
    free: Callable[[], None]


_HOST_QUANTUM: Final = 1 << 28
"""FLOPs of a turn on one CPU thread: a few milliseconds."""

_DEVICE_QUANTUM: Final = 1 << 35
"""FLOPs of a turn on a GPU: about a millisecond."""


class Compute(ABC):
    """What a session asks of its device. Results are written to ``out``, in its dtype."""

    description: str
    device: Device = Host()
    """Where operands have to be, and answers come from."""

    @abstractmethod
    def keep(self, incoming: Incoming, account: Account) -> Kept:
        """Make ``incoming`` last; takes over its block."""

    @abstractmethod
    def zeros(self, like: Tensor, account: Account) -> Kept:
        """Zeros of the shape and dtype of ``like``, which was kept."""

    @abstractmethod
    def expand(self, seed: bytes, out: Tensor) -> None:
        """The residues that ``seed`` stands for, into host memory."""

    @abstractmethod
    def forward(self, product: Product, x: Tensor, w: Tensor, out: Tensor) -> None:
        """``y`` from ``x`` and ``w``."""

    @abstractmethod
    def input_gradient(self, product: Product, g: Tensor, w: Tensor, out: Tensor) -> None:
        """``dx`` from ``g`` and ``w``."""

    @abstractmethod
    def weight_gradient(self, product: Product, g: Tensor, x: Tensor, out: Tensor) -> None:
        """``dw`` from ``g`` and ``x``."""

    @abstractmethod
    def accumulate(self, product: Product, g: Tensor, x: Tensor, gradient: Tensor) -> None:
        """Add ``dw`` from ``g`` and ``x`` to ``gradient``, which was kept."""

    @abstractmethod
    def update(self, rule: Rule, scale: float, w: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        """One step of an optimizer by ``scale`` × ``gradient``, as `tempo.worker.update.apply`; all were kept."""

    @abstractmethod
    def fetch(self, kept: Tensor, out: Tensor) -> None:
        """What was kept."""

    @abstractmethod
    def norm(self, kept: Tensor, out: Tensor) -> None:
        """Its length, as one number."""

    @abstractmethod
    def probe(self, size: int) -> None:
        """Multiply two ``size``×``size`` matrices."""

    @abstractmethod
    def fill(self, out: Tensor) -> None:
        """Put something harmless into ``out``."""


@final
class TorchCompute(Compute):
    """Real arithmetic on a CPU or GPU."""

    def __init__(self, device: torch.device | Device) -> None:
        self.device = device if isinstance(device, Device) else open_device(device)
        self.on_host = not self.device.queues
        self._residues = Multiplier(self.device)
        self._turns = Turns(_HOST_QUANTUM * torch.get_num_threads() if self.on_host else _DEVICE_QUANTUM)
        name = f" ({torch.cuda.get_device_name(self.device.torch)})" if self.device.torch.type == "cuda" else ""
        self.description = f"{self.device.torch}{name}"

    def keep(self, incoming: Incoming, account: Account) -> Kept:
        """On the host a block of our own is kept as it is; what lies in shared memory is copied."""
        pool, block, tensor = account.pool, incoming.block, incoming.tensor
        if self.on_host:
            if block is None:
                block = pool.take(tensor.nbytes)
                tensor = block.tensor(tuple(tensor.shape), tensor.dtype).copy_(tensor)
            return Kept(tensor, lambda: pool.give(block))
        size = tensor.nbytes
        try:
            account.reserve(size)
            try:
                tensor = self.device.upload(tensor)
            except BaseException:
                account.release(size)
                raise
        finally:
            if block is not None:
                pool.give(block)
        return Kept(tensor, lambda: account.release(size))

    def zeros(self, like: Tensor, account: Account) -> Kept:
        """On the host a block of our own."""
        if self.on_host:
            block = account.pool.take(like.nbytes)
            return Kept(block.tensor(tuple(like.shape), like.dtype).zero_(), lambda: account.pool.give(block))
        size = like.nbytes
        account.reserve(size)
        try:
            return Kept(torch.zeros_like(like), lambda: account.release(size))
        except BaseException:
            account.release(size)
            raise

    def expand(self, seed: bytes, out: Tensor) -> None:
        """By AES-CTR."""
        with self._turn():
            expand(seed, out)

    def forward(self, product: Product, x: Tensor, w: Tensor, out: Tensor) -> None:
        """``x wᵀ``, or the convolution."""
        if isinstance(product, Residues):
            self._multiply_residues(x, w, out, forward=True)
            return
        x, out = meant(product, "x", x), meant(product, "y", out)
        x, w = self._operands(product, x, w)
        for rows in self._parts(product, out, out, w):
            with self._turn():
                if isinstance(product, Linear):
                    self._multiply(x[rows], w.t(), out[rows])
                else:
                    out[rows].copy_(_convolve(product, x[rows], w))

    def input_gradient(self, product: Product, g: Tensor, w: Tensor, out: Tensor) -> None:
        """``g w``, or the convolution's."""
        if isinstance(product, Residues):
            self._multiply_residues(g, w, out, forward=False)
            return
        g, out = meant(product, "g", g), meant(product, "dx", out)
        g, w = self._operands(product, g, w)
        for rows in self._parts(product, out, g, w):
            with self._turn():
                if isinstance(product, Linear):
                    self._multiply(g[rows], w, out[rows])
                else:
                    shape_only = torch.empty_like(out[rows], dtype=w.dtype, device=w.device)
                    out[rows].copy_(_convolve_backward(product, g[rows], shape_only, w, 0))

    def weight_gradient(self, product: Product, g: Tensor, x: Tensor, out: Tensor) -> None:
        """``gᵀ x``, or the convolution's."""
        g, x = meant(product, "g", g), meant(product, "x", x)
        g, x = self._operands(product, g, x)
        for rows in self._parts(product, out, g, out):
            with self._turn():
                if not isinstance(product, Conv):
                    self._multiply(g[:, rows].t(), x, out[rows])
                else:
                    shape_only = x.new_empty(1).expand(out[rows].shape)
                    out[rows].copy_(_convolve_backward(product, g[:, rows], x, shape_only, 1))

    def accumulate(self, product: Product, g: Tensor, x: Tensor, gradient: Tensor) -> None:
        """Linear products without a copy, where the dtypes are one."""
        if isinstance(product, Linear) and g.dtype == x.dtype == gradient.dtype:
            g = self.device.upload(g)
            for rows in self._parts(product, gradient, g, gradient):
                with self._turn():
                    gradient[rows].addmm_(g[:, rows].t(), x)
            return
        dtype = torch.promote_types(torch.promote_types(g.dtype, x.dtype), gradient.dtype)
        dw = torch.empty_like(gradient, dtype=dtype)
        self.weight_gradient(product, g.to(dtype), x, dw)
        gradient.add_(dw)

    def update(self, rule: Rule, scale: float, w: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        """In place."""
        with self._turn():
            apply(rule, w, gradient.mul_(scale), state)

    def fetch(self, kept: Tensor, out: Tensor) -> None:
        """A copy."""
        out.copy_(kept)

    def norm(self, kept: Tensor, out: Tensor) -> None:
        """Summed in the dtype of ``out``."""
        out.copy_(torch.linalg.vector_norm(kept, dtype=out.dtype))

    def probe(self, size: int) -> None:
        """Returns when the product is there."""
        a = torch.ones(size, size, device=self.device.torch)
        for rows in self._parts(Linear(), a, a, a):
            with self._turn():
                torch.mm(a[rows], a)
        self.device.mark()()

    def fill(self, out: Tensor) -> None:
        """Zeros."""
        out.zero_()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """A turn at the device; while others are about it lasts until the work is done, not only queued."""
        with self._turns:
            yield
            if self.device.queues and self._turns.shared:
                self.device.mark()()

    def _parts(self, product: Product, out: Tensor, y: Tensor, w: Tensor) -> Iterator[slice]:
        """Rows of ``out`` for one turn each, where ``y`` (or ``g``) and ``w`` are of the product's shapes."""
        whole = out is w and isinstance(product, Conv) and product.groups > 1  # its rows belong to different groups
        least = len(out) if whole else 128 if isinstance(product, Linear) else 8
        return self._turns.parts(len(out), 2 * y.numel() * w.numel() // max(len(w), 1), max(least, 1))

    def _operands(self, product: Product, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(a.dtype, b.dtype)
        if self.on_host and isinstance(product, Conv):
            # On CPUs without such arithmetic, torch rounds gradients of half precision at every tap and image.
            dtype = torch.promote_types(dtype, torch.float32)
        a, b = (self.device.upload(t).to(dtype) for t in (a, b))
        if self.device.torch.type == "cuda" and isinstance(product, Conv) and a.dim() == 4 and dtype.itemsize == 2:
            # What tensor cores read; cuDNN would change the layout itself, there and back, at every call.
            a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
        return a, b

    def _multiply_residues(self, a: Tensor, w: Tensor, out: Tensor, *, forward: bool) -> None:
        a = self.device.upload(a)
        with self._turn():
            way = self._residues.prepare(a, w, forward=forward)
        for rows in self._parts(Linear(), out, out, w if forward else w.t()):
            with self._turn():
                way.multiply(a[rows], out[rows])

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if out.device == a.device and out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        else:
            out.copy_(torch.mm(a, b))


def output_shape(product: Product, x: Shape, w: Shape) -> Shape:
    """The shape of ``y``, all as they travel.

    Raises:
        Refusal: The operands do not fit the product.
    """
    if not isinstance(product, Conv):
        if len(x) == 2 and len(w) == 2 and x[1] == w[1]:
            return x[0], w[0]
        raise Refusal("bad-request", f"product of x{list(x)} and w{list(w)}")
    axes, sent_x, x = len(product.stride), x, meant_shape(product, "x", x)
    fits = (
        1 <= axes == len(product.padding) == len(product.dilation) == len(x) - 2 == len(w) - 2
        and min(product.stride) > 0
        and min(product.dilation) > 0
        and x[1] == w[1] * product.groups
        and w[0] % product.groups == 0
        and min(w[2:]) > 0
    )
    if fits:
        reach = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(product.dilation, w[2:])]
        padded = [size + 2 * padding for size, padding in zip(x[2:], product.padding)]
        if all(size >= need for size, need in zip(padded, reach)):
            spatial = ((size - need) // stride + 1 for size, need, stride in zip(padded, reach, product.stride))
            return sent_shape(product, "y", (x[0], w[0], *spatial))
    raise Refusal("bad-request", f"convolution of x{list(sent_x)} and w{list(w)} with {product}")


def _convolve(product: Conv, x: Tensor, w: Tensor) -> Tensor:
    return torch.convolution(
        x, w, None, product.stride, product.padding, product.dilation, False, [0] * len(product.stride), product.groups
    )


def _convolve_backward(product: Conv, g: Tensor, x: Tensor, w: Tensor, which: int) -> Tensor:
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        g,
        x,
        w,
        None,
        product.stride,
        product.padding,
        product.dilation,
        False,
        [0] * len(product.stride),
        product.groups,
        [which == 0, which == 1, False],
    )
    return gradients[which]

"""GELU and SiLU: value and gradient in one pass each, as fast as memory."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from tempo import kernels
from tempo.trusted.kernels import differentiated, native_for

_GELU: Final = {"none": "gelu", "tanh": "gelu_tanh"}
AT_ONCE: Final = 1 << 18
"""Elements that are worth a thread."""


class _Activation(torch.autograd.Function):
    """Keeps ``x`` and nothing else for the backward pass, as PyTorch does: recomputation may mix the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, native: ModuleType) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        y = torch.empty_like(x)
        _run(native, name, x, None, y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        native = native_for(x, g)
        if torch.is_grad_enabled() or native is None:  # to be differentiated again, or hooks made something else of it
            return *differentiated(lambda x: by_torch(ctx.name, x), (x,), (True,), g), None, None
        dx = torch.empty_like(x)
        _run(native, ctx.name, x.contiguous(), g.contiguous(), dx)
        return dx, None, None


def _run(native: ModuleType, name: str, x: Tensor, g: Tensor | None, out: Tensor) -> None:
    x, g, out = x.detach().view(-1), None if g is None else g.detach().view(-1), out.view(-1)

    def part(first: int, last: int) -> None:
        native.activation(name, x[first:last], None if g is None else g[first:last], out[first:last])

    kernels.in_parts(part, len(x), AT_ONCE)


def by_torch(name: str, x: Tensor) -> Tensor:
    """The activation ``name`` of ``x``: ``gelu``, ``gelu_tanh`` or ``silu``."""
    return F.silu(x) if name == "silu" else F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor | None:  # noqa: A002 - the name PyTorch uses
    """As `torch.nn.functional.gelu`; None where PyTorch has to compute it."""
    return _activation(input, _GELU.get(approximate))


def silu(input: Tensor, inplace: bool = False) -> Tensor | None:  # noqa: A002
    """As `torch.nn.functional.silu`; None where PyTorch has to compute it."""
    return None if inplace else _activation(input, "silu")


def _activation(x: Tensor, name: str | None) -> Tensor | None:
    native = native_for(x)
    if name is None or native is None or not x.is_contiguous():
        return None
    y: Tensor = _Activation.apply(x, name, native)
    return y

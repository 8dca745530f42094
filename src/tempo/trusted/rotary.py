"""Rotary position embedding in one pass each way: as it is written in ``transformers``, it takes five and more.

There it is a function that attention modules find among the names of their Python module. `rotated` makes a mixin whose
``forward`` is theirs, but finds ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from tempo import kernels
from tempo.layers.base import Protected
from tempo.trusted.kernels import native_for

NAME: Final = "apply_rotary_pos_emb"
_WIDTHS: Final = 32
"""Features per head come in multiples of it."""


def rotate_half(x: Any) -> Any:
    """As written in ``transformers``."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    """As written in ``transformers``."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


class _Rotation(torch.autograd.Function):
    """Of ``x`` (samples, heads, tokens, features) by ``cos`` and ``sin`` (1 or samples, tokens, features)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, back: bool, native: ModuleType) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.back = back
        out = torch.empty_like(x)

        def part(first: int, last: int) -> None:
            angles = (t if len(t) == 1 else t[first:last] for t in (cos, sin))
            native.rotate(x.detach()[first:last], *angles, out[first:last], back)

        kernels.in_parts(part, len(x), 1)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(g if g.stride(3) == 1 else g.contiguous(), cos, sin, not ctx.back), None, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    native = native_for(x, cos, sin)
    if native is not None:
        y: Tensor = _Rotation.apply(x, cos.contiguous(), sin.contiguous(), back, native)
        return y
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    y = x * cos - rotate_half(x * sin) if back else x * cos + rotate_half(x) * sin
    return y


def rotate_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """As `apply_rotary_pos_emb`."""
    if (
        native_for(q, k, cos, sin) is None
        or unsqueeze_dim != 1
        or cos.requires_grad
        or sin.requires_grad
        or cos.shape != sin.shape
        or any(_unfit(x, cos) for x in (q, k))
    ):
        result: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        return result
    return _rotate(q, cos, sin, False), _rotate(k, cos, sin, False)


def _unfit(x: Tensor, cos: Tensor) -> bool:
    if x.dim() != 4 or cos.dim() != 3 or x.stride(3) != 1 or x.shape[3] % _WIDTHS:
        return True
    return cos.shape[0] not in (1, x.shape[0]) or cos.shape[1:] != x.shape[2:]


def rotated(forward: Callable[..., Any]) -> type[Protected]:
    """A mixin whose ``forward`` is ``forward`` with `rotate_pair` in it; other names mean what they mean now."""
    mixin = _mixin(forward)
    vars(mixin)["forward"].__globals__.update({**forward.__globals__, NAME: rotate_pair})
    return mixin


@cache
def _mixin(forward: Any) -> type[Protected]:
    twin = FunctionType(forward.__code__, {}, forward.__name__, forward.__defaults__, forward.__closure__)
    twin.__kwdefaults__ = forward.__kwdefaults__
    return type(
        "Rotated", (Protected,), {"forward": twin, "__doc__": "Attention that turns queries and keys natively."}
    )

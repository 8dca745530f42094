"""Scaled dot-product attention without scores of all heads in memory, for the lengths where that beats PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tempo import kernels
from tempo.trusted.kernels import native_for, recomputes

_LONGEST: Final = {False: 512, True: 2048}
"""Keys, by whether attention is causal; beyond, PyTorch's own kernel is as fast, or was not measured."""
_WIDTHS: Final = 16
"""Features per head come in multiples of it."""


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, native: ModuleType) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])

        def part(first: int, last: int) -> None:
            native.attention(*(t.detach()[first:last] for t in (q, k, v, out, lse)), scale, causal)

        kernels.in_parts(part, len(q), 1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.causal, ctx.native = scale, causal, native
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = _gradients(q, k, v)
        g = g if g.stride(3) == 1 else g.contiguous()

        def part(first: int, last: int) -> None:
            operands = (t[first:last] for t in (g, q, k, v, out, lse, dq, dk, dv))
            ctx.native.attention_gradient(*operands, ctx.scale, ctx.causal)

        kernels.in_parts(part, len(q), 1)
        return dq, dk, dv, None, None, None


def _gradients(*operands: Tensor) -> Sequence[Tensor]:
    """Room for gradients like ``operands`` (samples, heads, tokens, width).

    Side by side where ``operands`` lie tokens first, as projections leave them. So what projected them gets the
    gradient of all of them as one matrix, without a copy.
    """
    tokens_first = [t.transpose(1, 2) for t in operands]
    samples, tokens, _, width = tokens_first[0].shape
    if not all(t.is_contiguous() and t.shape[1] == tokens for t in tokens_first):
        return [torch.empty_like(t) for t in operands]
    heads = [t.shape[2] for t in tokens_first]
    whole = operands[0].new_empty(samples, tokens, sum(heads), width)
    return [part.transpose(1, 2) for part in whole.split(heads, 2)]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """As `torch.nn.functional.scaled_dot_product_attention`; None where PyTorch has to compute it.

    That is with masks or dropout, for long sequences, and where saved tensors may be recomputed.
    """
    native = native_for(query, key, value)
    if (
        native is None
        or attn_mask is not None
        or dropout_p
        or not (query.dim() == key.dim() == value.dim() == 4)
        or key.shape != value.shape
        or query.shape[0] != key.shape[0]
        or (query.shape[1] % key.shape[1] if enable_gqa else query.shape[1] != key.shape[1])
        or query.shape[3] != key.shape[3]
        or query.shape[3] % _WIDTHS
        or key.shape[2] > _LONGEST[bool(is_causal)]
        or 0 in (query.shape[2], key.shape[2])
        or any(t.stride(3) != 1 for t in (query, key, value))
        or recomputes()
    ):
        return None
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    if scale <= 0:
        return None
    out: Tensor = _Attention.apply(query, key, value, scale, is_causal, native)
    return out


def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's function of that name, computed here where that can be."""
    out = attention(*args, **kwargs)
    return F.scaled_dot_product_attention(*args, **kwargs) if out is None else out

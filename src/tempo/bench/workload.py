"""What a workload is: a model, a batch and its loss; and the attention in it, which is measured by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tempo.trusted.attention import scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of one block, which stays in the trusted process, over a batch of sequences."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    """Of a head."""
    causal: bool

    @property
    def tokens(self) -> int:
        """In the batch."""
        return self.batch * self.length

    @property
    def flops(self) -> int:
        """Forward and backward: seven products of a length's square, of which a causal one needs half."""
        whole = 14 * self.batch * self.heads * self.length**2 * self.width
        return whole // 2 if self.causal else whole

    def seconds(self) -> float:
        """Of one forward and backward pass with random operands, by the kernels that a protected model is given."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (torch.randn(self.batch, self.length, n, self.width).transpose(1, 2) for n in heads)
        for operand in (q, k, v):
            operand.requires_grad_()
        start = time.perf_counter()
        grouped = self.kv_heads < self.heads
        y = scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=grouped)
        y.backward(torch.ones_like(y))
        return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Workload:
    """A model and how to compute its loss on one batch."""

    description: str
    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    batch: int
    trusted: tuple[str, ...] = ()
    """Layers that stay trusted by default: those that see raw inputs."""
    attention: Attention | None = None
    """Of a language model."""

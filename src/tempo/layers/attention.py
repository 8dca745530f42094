"""`nn.MultiheadAttention`, and the transformer layers that would bypass it.

PyTorch's attention function reaches its projections through the name ``linear`` of its own module. Here it runs with
that name bound to a protected product, and attention itself to our kernel, so every option (packed or separate
projections, masks, added keys, returned weights) behaves as in the installed PyTorch. Softmax and the two attention
products stay trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempo.engine.adapters import Operands
from tempo.engine.site import Site
from tempo.layers.base import Protected
from tempo.trusted.attention import scaled_dot_product_attention

Projection = Callable[..., Tensor]


def _with_linear(linear: Projection) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """PyTorch's ``multi_head_attention_forward`` with its projections computed by ``linear``."""
    names = dict(vars(F), linear=linear, scaled_dot_product_attention=scaled_dot_product_attention)
    for name in ("_in_projection", "_in_projection_packed", "multi_head_attention_forward"):
        original = getattr(F, name)
        rebound = FunctionType(original.__code__, names, name, original.__defaults__, original.__closure__)
        rebound.__kwdefaults__ = original.__kwdefaults__
        names[name] = rebound
    return names["multi_head_attention_forward"]  # type: ignore[no-any-return]


class Projections(Site):
    """The site of an attention layer: one site for each projection in it."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.engine, site.name, site.scheme, site.keep_trusted)
        self.parts: dict[str, Site] = {}
        self.names: dict[int, str] = {}
        self.attention = _with_linear(self.project)

    def __deepcopy__(self, memo: dict[int, object]) -> Projections:
        return Projections(super().__deepcopy__(memo))

    @property
    def sites(self) -> list[Site]:
        """Of its projections, those that were called."""
        return list(self.parts.values())

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias`` by the site of that slice of the layer's parameters."""
        # A packed parameter arrives whole (self-attention) or in slices (cross-attention).
        key = self.names.get(id(weight)) or f"in@{weight.storage_offset()}+{len(weight)}"
        if key not in self.parts:
            self.parts[key] = Site(self.engine, f"{self.name}[{key}]", self.scheme, self.keep_trusted)
        y: Tensor = self.parts[key].linear(x, lambda: Operands(weight, bias), lambda: F.linear(x, weight, bias))
        return y


class ProtectedMultiheadAttention(Protected, nn.MultiheadAttention):
    """Multi-head attention whose projections are computed under masks."""

    _tempo: Projections

    @torch.compiler.disable
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, never by its fused path, which would bypass the projections."""
        batched = query.dim() == 3
        if self.batch_first and batched:
            # One tensor stays one tensor: PyTorch recognises self-attention by identity.
            swapped = {id(t): t.transpose(0, 1) for t in (query, key, value)}
            query, key, value = swapped[id(query)], swapped[id(key)], swapped[id(value)]
        separate = not self._qkv_same_embed_dim
        # Looked up once: a parametrized weight is another tensor every time.
        out, packed = self.out_proj.weight, self.in_proj_weight
        q, k, v = (getattr(self, f"{name}_proj_weight") if separate else None for name in "qkv")
        self._tempo.names = {id(w): name for w, name in ((out, "out"), (packed, "in"), (q, "q"), (k, "k"), (v, "v"))}
        output, weights = self._tempo.attention(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            packed,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            out,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=separate,
            q_proj_weight=q,
            k_proj_weight=k,
            v_proj_weight=v,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        if self.batch_first and batched:
            output = output.transpose(1, 0)
        return output, weights


@contextmanager
def _no_fused_path() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class ProtectedTransformerEncoderLayer(Protected, nn.TransformerEncoderLayer):
    """Evaluates by its parts: the fused path would read their weights and compute in the trusted process."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `nn.TransformerEncoderLayer.forward`."""
        with _no_fused_path():
            return super().forward(*args, **kwargs)


class ProtectedTransformerEncoder(Protected, nn.TransformerEncoder):
    """Evaluates padded, not nested, tensors."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `nn.TransformerEncoder.forward`."""
        with _no_fused_path():
            return super().forward(*args, **kwargs)

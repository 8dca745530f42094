"""LoRA on one block of a language model: a frozen base with random weights of the true shapes, adapters on all of it.

Blocks are those of `transformers`, adapters those of `peft`; a step goes back to the adapters and to the block's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from tempo.bench.workload import Attention, Workload

RANK: Final = 16
LENGTH: Final = 256
"""Tokens in a sequence."""


def _workload(name: str, block: nn.Module, attention: Attention, inputs: Mapping[str, Any] | None = None) -> Workload:
    """Adapters on every fully connected layer of ``block``, whose call is given ``inputs`` besides its tokens."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    kinds = {layer: type(module) for layer, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    # Peft's own start of B is zero, and with it a step that costs less than the others.
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=list(kinds),
        fan_in_fan_out=Conv1D in kinds.values(),
        init_lora_weights=False,
    )
    block = inject_adapter_in_model(config, block)
    x = torch.randn(attention.batch, attention.length, attention.heads * attention.width)

    def loss(model: nn.Module) -> Tensor:
        y: Tensor = model(x.detach().requires_grad_(), **(inputs or {}))
        return y.square().mean()

    description = f"LoRA of rank {RANK} on a block of {name}, {attention.batch} sequences of {attention.length}"
    return Workload(description, block, loss, attention.batch, attention=attention)


def _llama(name: str, width: int, heads: int, kv_heads: int, mlp: int, batch: int) -> Workload:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        attn_implementation="sdpa",
    )
    positions = LlamaRotaryEmbedding(config)(torch.empty(0), torch.arange(LENGTH)[None])  # once for all blocks
    attention = Attention(batch, heads, kv_heads, LENGTH, width // heads, causal=True)
    return _workload(name, LlamaDecoderLayer(config, 0), attention, {"position_embeddings": positions})


def llama_1b(batch: int = 32) -> Workload:
    """Of Llama-3.2-1B."""
    return _llama("Llama-3.2-1B", 2048, 32, 8, 8192, batch)


def llama_small(batch: int = 8) -> Workload:
    """Of the same architecture and narrow, for a first look."""
    return _llama("a Llama of width 512", 512, 8, 8, 1536, batch)


def gpt2(batch: int = 32) -> Workload:
    """Of GPT-2, without dropout, its activation in one kernel: `transformers` makes ``gelu_new`` of many."""
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    config = GPT2Config(
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa"
    )
    attention = Attention(batch, 12, 12, LENGTH, 64, causal=True)
    return _workload("GPT-2 (GELU in one kernel)", GPT2Block(config, layer_idx=0), attention)


def minilm(batch: int = 32) -> Workload:
    """Of MiniLM-L6, a BERT, without dropout."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    config = BertConfig(
        hidden_size=384,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return _workload("MiniLM-L6", BertLayer(config), Attention(batch, 12, 12, LENGTH, 32, causal=False))


LORA: Final[dict[str, Callable[..., Workload]]] = {
    "llama-small": llama_small,
    "llama-1b": llama_1b,
    "gpt2": gpt2,
    "minilm": minilm,
}

"""Hugging Face models of random weights, as small as they get, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

IDS = torch.arange(24).view(2, 12) * 7 % 64
TEXT = {"input_ids": IDS, "labels": IDS}
# Varied images, and not too few: BatchNorm divides by the spread of a batch, and with it rounding errors.
IMAGES = {
    "pixel_values": torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    "labels": torch.arange(6) % 3,
}
NARROW: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert() -> nn.Module:
    config = hf.BertConfig(vocab_size=64, max_position_embeddings=16, num_labels=3, **NARROW, **NO_DROPOUT)
    return hf.BertForSequenceClassification(config)


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=4, num_labels=3, **NARROW, **NO_DROPOUT))


def resnet() -> nn.Module:
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck", num_labels=3)
    )


def llama() -> nn.Module:
    config = hf.LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, **NARROW)
    return hf.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2, **dropout))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "bert": (bert, {"input_ids": IDS, "labels": torch.tensor([0, 2])}),
    "vit": (vit, IMAGES),
    "resnet": (resnet, IMAGES),
    "llama": (llama, TEXT),
    "gpt2": (gpt2, TEXT),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    # Some are zero but for rounding (a key's bias, a bias before BatchNorm): those are compared with the rest.
    largest = max(float(g.norm()) for g in expected.values())
    for name, g in expected.items():
        error = float((actual[name] - g).norm()) / max(float(g.norm()), 1e-2 * largest)
        assert error <= tolerance, f"{name}: {error}"

"""Shapes of models of Llama's architecture: published ones, and those of a ``config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from tempo.errors import SettingsError, nearest

Size = Annotated[int, Meta(ge=1, le=1 << 24)]

ARCHITECTURES: Final = ("llama", "mistral", "qwen2", "qwen3")
"""Of ``model_type``: those with these products and no others."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of a model, named as in Hugging Face's ``config.json``."""

    model_type: str = "llama"
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    """None: as many as heads."""
    head_dim: Size | None = None
    """None: ``hidden_size / num_attention_heads``."""
    vocab_size: Size

    @property
    def attention_width(self) -> int:
        """Features of all queries of a token."""
        return self.num_attention_heads * (self.head_dim or self.hidden_size // self.num_attention_heads)

    @property
    def products(self) -> list[tuple[int, int]]:
        """Input and output features of each product of a token, layers that share an input being one, as they travel.

        Those of every block, and of the head.
        """
        q, d, mlp = self.attention_width, self.hidden_size, self.intermediate_size
        kv = q // self.num_attention_heads * (self.num_key_value_heads or self.num_attention_heads)
        block = [(d, q + 2 * kv), (q, d), (d, 2 * mlp), (mlp, d)]
        return block * self.num_hidden_layers + [(d, self.vocab_size)]

    @property
    def weights(self) -> int:
        """Elements of the frozen weights that workers hold: all but embeddings and norms."""
        return sum(d * m for d, m in self.products)

    @property
    def backward(self) -> list[tuple[int, int]]:
        """Products whose inputs' gradients are wanted: all but the first, before which nothing is trained."""
        return self.products[1:]

    @property
    def sent(self) -> int:
        """Features that a token sends up: inputs of all products, gradients of outputs."""
        return sum(d for d, _ in self.products) + sum(m for _, m in self.backward)

    @property
    def received(self) -> int:
        """Features that come down, from each operator: outputs, and gradients of inputs."""
        return sum(m for _, m in self.products) + sum(d for d, _ in self.backward)

    @property
    def multiplications(self) -> int:
        """Of a token, forward and backward."""
        return self.weights + sum(d * m for d, m in self.backward)


PRESETS: Final = {
    "llama-2-7b": Shape(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
    "llama-2-70b": Shape(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
    ),
}
"""As published by Meta."""


def find(name: str) -> Shape:
    """The shape called ``name``, or that in the file, or the folder of the file, of that name.

    Raises:
        SettingsError: There is neither, or the file does not describe a model of `ARCHITECTURES`.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise SettingsError(f"plan: no model and no file {name!r}; {nearest(name, PRESETS)}, or give a config.json")
    try:
        shape = msgspec.json.decode(path.read_bytes(), type=Shape)
    except msgspec.DecodeError as error:
        raise SettingsError(f"plan: {path}: {error}") from None
    if shape.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise SettingsError(f"plan: {path}: model_type {shape.model_type!r} is none that is known here ({known})")
    if shape.head_dim is None and shape.hidden_size % shape.num_attention_heads:
        raise SettingsError(
            f"plan: {path}: hidden_size is no multiple of num_attention_heads, and there is no head_dim"
        )
    if shape.num_attention_heads % (shape.num_key_value_heads or 1):
        raise SettingsError(f"plan: {path}: num_attention_heads is no multiple of num_key_value_heads")
    return shape

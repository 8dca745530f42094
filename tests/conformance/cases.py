"""One case per protected layer: how to make it and its input from drawn sizes, and how many FLOPs must go out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SIZE = st.one_of(st.integers(1, 24), st.sampled_from([1, 13, 31, 37]))
Draw = Callable[[st.SearchStrategy], object]


@dataclass
class Case:
    """A module, its input, and how to call it."""

    module: nn.Module
    x: Tensor
    call: Callable[[nn.Module, Tensor], Tensor]


def plain_call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def noncontiguous(draw: Draw, x: Tensor) -> Tensor:
    """The same values, sometimes behind other strides."""
    if draw(st.booleans()):
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


def linear(draw: Draw) -> Case:
    batch, tokens, inputs, outputs = (draw(SIZE) for _ in range(4))
    x = torch.randn(batch, tokens, inputs)
    return Case(nn.Linear(inputs, outputs, bias=draw(st.booleans())), noncontiguous(draw, x), plain_call)


def hf_conv1d(draw: Draw) -> Case:
    batch, tokens, inputs, outputs = (draw(SIZE) for _ in range(4))
    return Case(Conv1D(outputs, inputs), torch.randn(batch, tokens, inputs), plain_call)


def convolution(draw: Draw, dims: int) -> Case:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels_in, channels_out = (groups * draw(st.integers(1 + (groups > 1), 5)) for _ in range(2))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]))
    same = draw(st.booleans())
    module = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](
        channels_in,
        channels_out,
        kernel,
        stride=1 if same else [draw(st.integers(1, 3)) for _ in range(dims)],
        padding="same" if same else [draw(st.integers(0, 1)) for _ in range(dims)],
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    size = [draw(st.integers(6, 9)) for _ in range(dims)]
    x = torch.randn(draw(st.integers(1, 5)), channels_in, *size)
    if dims == 2 and draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    return Case(module, x, plain_call)


def conv1d(draw: Draw) -> Case:
    return convolution(draw, 1)


def conv2d(draw: Draw) -> Case:
    return convolution(draw, 2)


def conv3d(draw: Draw) -> Case:
    return convolution(draw, 3)


def pointwise(draw: Draw) -> Case:
    channels_in, channels_out = draw(SIZE), draw(SIZE)
    x = torch.randn(draw(st.integers(1, 4)), channels_in, draw(st.integers(2, 7)), draw(st.integers(2, 7)))
    return Case(nn.Conv2d(channels_in, channels_out, 1, stride=draw(st.integers(1, 2))), x, plain_call)


def attention(draw: Draw) -> Case:
    heads = draw(st.sampled_from([1, 2, 3]))
    width = heads * draw(st.integers(1, 6))
    tokens, batch, source = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(2, 7))
    kind = draw(st.sampled_from(["self", "cross", "separate"]))
    separate = {"kdim": width + 1, "vdim": width + 2} if kind == "separate" else {}
    module = nn.MultiheadAttention(
        width,
        heads,
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        batch_first=True,
        **separate,
    )
    k = torch.randn(batch, source, separate.get("kdim", width))
    v = torch.randn(batch, source, separate.get("vdim", width))
    need_weights = draw(st.booleans())
    mask = torch.zeros(batch, tokens if kind == "self" else source, dtype=torch.bool)
    mask[:, -1] = mask.shape[1] > 1

    def call(module: nn.Module, x: Tensor) -> Tensor:
        keys, values = (x, x) if kind == "self" else (k.to(x.dtype), v.to(x.dtype))
        if kind == "cross":
            values = keys
        return module(x, keys, values, key_padding_mask=mask, need_weights=need_weights)[0]

    return Case(module, torch.randn(batch, tokens, width), call)


class SharedInput(nn.Module):
    """Query, key and value of unequal widths on one input, then a product of them."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, narrow), nn.Linear(width, narrow, bias=False)
        self.v, self.o = nn.Linear(width, width), nn.Linear(narrow, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(x) + self.o(self.q(x) * torch.sigmoid(self.k(x)))


def shared_input(draw: Draw) -> Case:
    width, narrow, rows = draw(SIZE), draw(SIZE), draw(SIZE)
    return Case(SharedInput(width, narrow), torch.randn(rows, width), plain_call)


def encoder_layer(draw: Draw) -> Case:
    width = 2 * draw(st.integers(2, 8))
    module = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(width, 2, draw(SIZE), dropout=0.0, activation="gelu", batch_first=True), 1
    )
    return Case(module, torch.randn(draw(st.integers(1, 4)), draw(st.integers(1, 9)), width), plain_call)


CASES = {
    "linear": linear,
    "hf_conv1d": hf_conv1d,
    "conv1d": conv1d,
    "conv2d": conv2d,
    "conv3d": conv3d,
    "pointwise": pointwise,
    "attention": attention,
    "shared_input": shared_input,
    "encoder_layer": encoder_layer,
}

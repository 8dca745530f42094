"""An honest worker's answers to one product, and the checks of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from hypothesis import strategies as st
from torch import Tensor

from tempo.engine.geometry import output_shape
from tempo.keys import KeySchedule
from tempo.verify.checks import GradientCheck, InputCheck, Residual, WeightCheck
from tempo.wire.layout import maps, meant, sent
from tempo.wire.messages import Conv, Linear, Product
from tempo.worker.compute import TorchCompute

KEYS = KeySchedule()
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ANSWERS = ["y", "dx", "dw"]


@dataclass
class Exchange:
    """What was sent, and what an honest worker answers."""

    product: Product
    x: Tensor
    w: Tensor
    g: Tensor

    @property
    def answers(self) -> dict[str, Tensor]:
        compute = TorchCompute(torch.device("cpu"))
        product, dtype = self.product, self.x.dtype
        x, g = sent(product, "x", self.x), sent(product, "g", self.g)
        y, dx, dw = torch.empty(g.shape, dtype=dtype), torch.empty(x.shape, dtype=dtype), torch.empty_like(self.w)
        compute.forward(product, x, self.w, y)
        compute.input_gradient(product, g, self.w, dx)
        compute.weight_gradient(product, g, x, dw)
        return {"y": meant(product, "y", y), "dx": meant(product, "dx", dx), "dw": dw}

    def scaled(self, x: float = 1.0, w: float = 1.0, g: float = 1.0) -> Exchange:
        return Exchange(self.product, self.x * x, self.w * w, self.g * g)

    def checks(self, vectors: int = 4) -> tuple[InputCheck, GradientCheck]:
        weight = WeightCheck(self.product, self.w, KEYS.fresh(0, "w"), vectors)
        source = weight.forward(self.x, KEYS.fresh(0, "x"), keep=True)
        return source, source.backward(self.g, want_dx=True, want_dw=True)

    def judge(self, vectors: int = 4, **answers: Tensor) -> dict[str, Residual]:
        """What checks find in ``answers``."""
        source, gradient = self.checks(vectors)
        judges = {"y": source.output, "dx": gradient.input_gradient, "dw": gradient.weight_gradient}
        return {name: judges[name](answer) for name, answer in answers.items()}


def exchange(
    product: Product, x: tuple[int, ...], w: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Exchange:
    generator = torch.Generator().manual_seed(seed)
    shapes = (x, w, output_shape(product, x, w))
    tx, tw, tg = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return Exchange(product, maps(product, x, dtype).copy_(tx), tw, maps(product, shapes[2], dtype).copy_(tg))


LINEAR = (Linear(), (40, 64), (48, 64))
CONV2D = (Conv((2, 1), (1, 2), (1, 2), 2), (4, 8, 9, 11), (12, 4, 3, 3))
KINDS = {
    "linear": LINEAR,
    "conv1d": (Conv((2,), (1,), (1,), 1), (5, 6, 14), (8, 6, 3)),
    "conv2d": CONV2D,
    "conv3d": (Conv((1, 2, 1), (1, 0, 1), (1, 1, 1), 1), (3, 4, 4, 6, 5), (6, 4, 2, 3, 2)),
    "pointwise": (Conv((1, 1), (0, 0), (1, 1), 1), (4, 16, 5, 5), (12, 16, 1, 1)),
    "channels last": (Conv((2, 1), (1, 1), (1, 1), 1, True), (4, 8, 9, 10), (12, 8, 3, 3)),
    "groups, channels last": (Conv((2, 1), (1, 2), (1, 2), 2, True), *CONV2D[1:]),
    "depthwise": (Conv((1, 1), (1, 1), (1, 1), 6), (4, 6, 7, 7), (6, 1, 3, 3)),
}


@st.composite
def exchanges(draw: st.DrawFn) -> Exchange:
    """Any product, of any dtype."""
    sizes = st.integers(1, 9)
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1 << 30))
    axes = draw(st.integers(0, 3))
    if not axes:
        t, d, m = draw(st.integers(0, 40)), draw(st.integers(1, 70)), draw(st.integers(1, 70))
        return exchange(Linear(), (t, d), (m, d), dtype, seed)
    groups = draw(st.integers(1, 3))
    stride, dilation, padding = ([draw(st.integers(low, 2)) for _ in range(axes)] for low in (1, 1, 0))
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    # At least one output pixel.
    room = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding)]
    space = [max(1, need) + draw(st.integers(0, 6)) for need in room]
    product = Conv(tuple(stride), tuple(padding), tuple(dilation), groups, draw(st.booleans()))
    inputs, outputs = draw(sizes), draw(sizes)
    x = (draw(st.integers(1, 5)), groups * inputs, *space)
    return exchange(product, x, (groups * outputs, inputs, *kernel), dtype, seed)


def rows(answer: Tensor, name: str) -> int:
    """How many rows an ungrouped answer has."""
    return len(answer) if name == "dw" else len(answer) * prod(answer.shape[2:])

"""One product of random operands, an honest worker's answers to it, and tolerances of their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tempo.engine.geometry import output_shape
from tempo.keys import KeySchedule
from tempo.verify.checks import GradientCheck, InputCheck, Residual, WeightCheck
from tempo.verify.tolerance import Rounding, threshold
from tempo.wire.messages import Conv, Product
from tempo.worker.compute import TorchCompute

KEYS = KeySchedule()
ANSWERS = ("y", "dx", "dw")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Exchange:
    """What is sent, and what an honest worker answers."""

    product: Product
    x: Tensor
    w: Tensor
    g: Tensor

    def answers(self) -> dict[str, Tensor]:
        compute = TorchCompute(torch.device("cpu"))
        y, dx, dw = (torch.empty(t.shape, dtype=self.x.dtype) for t in (self.g, self.x, self.w))
        compute.forward(self.product, self.x, self.w, y)
        compute.input_gradient(self.product, self.g, self.w, dx)
        compute.weight_gradient(self.product, self.g, self.x, dw)
        return {"y": y, "dx": dx, "dw": dw}

    def checks(self, vectors: int = 4) -> Checks:
        weight = WeightCheck(self.product, self.w, KEYS.fresh(0, "w"), vectors)
        source = weight.forward(self.x, KEYS.fresh(0, "x"), keep=True)
        return Checks(self, weight, source, source.backward(self.g, want_dx=True, want_dw=True))


@dataclass
class Checks:
    """Checks of one exchange under fresh secrets."""

    sent: Exchange
    weight: WeightCheck
    source: InputCheck
    gradient: GradientCheck

    def __post_init__(self) -> None:
        self._y = self.source.y

    def judge(self, name: str, answer: Tensor) -> Residual:
        self.source.y = self._y  # normally an answer is judged once
        judges = {"y": self.source.output, "dx": self.gradient.input_gradient, "dw": self.gradient.weight_gradient}
        return judges[name](answer)

    def tolerances(self, name: str, answer: Tensor) -> Tensor:
        """Of every row of an honest ``answer``, as `rows` orders them."""
        w = self.sent.w
        sums = {"y": self._y, "dx": self.gradient.dx, "dw": self.gradient.dw}[name]
        scale = sums.lengths * (self.source.length if name == "dw" else self.weight.length)
        m, d, taps = w.shape[0] // self.weight.form.groups, w.shape[1], w[0, 0].numel()
        count = self.sent.g.numel() // w.shape[0]
        inner, width = {"y": (d * taps, m), "dx": (m * taps, d), "dw": (count, d * taps)}[name]
        found = rows(self.sent.product, name, answer).double().norm(dim=-1)
        rounding = Rounding(inner, width, self.weight.work, answer.dtype)
        return threshold(self.weight.vectors) * rounding.error_norm(scale, found)


def rows(product: Product, name: str, answer: Tensor) -> Tensor:
    """``answer`` with its rows along all axes but the last; a view where it can be."""
    if not isinstance(product, Conv):
        return answer
    if name == "dw":
        return answer.reshape(product.groups, len(answer) // product.groups, -1)
    return answer.reshape(len(answer), product.groups, answer.shape[1] // product.groups, -1).transpose(2, 3)


def exchange(
    product: Product, x: tuple[int, ...], w: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Exchange:
    shapes = (x, w, output_shape(product, x, w))
    return Exchange(product, *(torch.randn(shape, generator=generator).to(dtype) for shape in shapes))

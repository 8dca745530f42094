"""A product under a scheme without any process: encode, the worker's own arithmetic, decode."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tempo.keys import KeySchedule
from tempo.schemes.base import EncodedInput, Problem, Scheme, Target
from tempo.schemes.reply import Passed
from tempo.wire.messages import Conv, Linear, Product
from tempo.worker.compute import TorchCompute

WORKER = TorchCompute(torch.device("cpu"))


@dataclass
class Result:
    """What came out, and what workers saw, by worker."""

    y: Tensor
    dx: Tensor
    dw: Tensor
    source: EncodedInput
    seen: dict[str, dict[int, Tensor]] = field(default_factory=dict)


def empty(worker: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def targets(*operators: str) -> list[Target]:
    """A worker of each operator, of unequal shares."""
    return [Target(i, operator, 1.0 + i) for i, operator in enumerate(operators)]


def plain(product: Product, x: Tensor, w: Tensor, g: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y, G (random unless given), dX and dW by PyTorch."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    if isinstance(product, Conv):
        convolution = {1: torch.conv1d, 2: torch.conv2d}[len(product.stride)]
        y = convolution(x, w, None, product.stride, product.padding, product.dilation, product.groups)
    else:
        y = x @ w.t()
    g = torch.randn_like(y) if g is None else g
    y.backward(g)
    return y.detach(), g, x.grad, w.grad


def run(
    scheme: Scheme,
    x: Tensor,
    w: Tensor,
    g: Tensor,
    product: Product | None = None,
    workers: list[Target] | None = None,
    wire: torch.dtype | None = None,
) -> Result:
    product, workers, wire = product or Linear(), workers or targets("one"), wire or x.dtype
    keys = KeySchedule()
    weight = scheme.encode_weight(Problem(product, wire), w, keys.fresh(1, "w"), workers, empty)
    source = weight.encode_input(x, keys.fresh(1, "x"), workers, empty, lambda: w)
    masked_w = {operand.worker: operand.tensors["w"] for operand in weight.operands}
    masked_x = {operand.worker: operand.tensors["x"] for operand in source.operands}
    answers = {"y": {}, "dx": {}, "dw": {}}
    spatial = plain(product, x[:1], w)[0].shape[2:]
    for worker, x_masked in masked_x.items():
        w_masked = masked_w[worker]
        answers["y"][worker] = torch.empty(len(x_masked), len(w_masked), *spatial, dtype=wire)
        WORKER.forward(product, x_masked, w_masked, answers["y"][worker])
    (y,) = source.decode_output(passed(answers["y"]), [len(w)])
    gradient = source.encode_gradient(g, keys.fresh(1, "g"), empty, lambda: x, lambda: w, want_dw=True)
    masked_g = {operand.worker: operand.tensors["g"] for operand in gradient.operands}
    for worker, g_masked in masked_g.items():
        answers["dx"][worker] = torch.empty_like(masked_x[worker])
        WORKER.input_gradient(product, g_masked, masked_w[worker], answers["dx"][worker])
        answers["dw"][worker] = torch.empty_like(masked_w[worker])
        WORKER.weight_gradient(product, g_masked, masked_x[worker], answers["dw"][worker])
    dx = gradient.decode_input_gradient(passed(answers["dx"]))
    (dw,) = gradient.decode_weight_gradient(passed(answers["dw"]), [len(w)])
    return Result(y, dx, dw, source, {"x": masked_x, "w": masked_w, "g": masked_g} | answers)


def passed(answers: dict[int, Tensor]) -> dict[int, Passed]:
    return {worker: Passed(answer) for worker, answer in answers.items()}

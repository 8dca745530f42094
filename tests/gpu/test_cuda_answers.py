"""Honest answers of a CUDA device pass the checks: no TF32, no sums in half precision. Run with ``make test-gpu``."""

from __future__ import annotations

import pytest
import torch

from tempo.keys import KeySchedule
from tempo.verify.checks import WeightCheck
from tempo.wire.messages import Conv, Linear
from tempo.worker.compute import TorchCompute, output_shape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("product", "x", "w"),
    [
        (Linear(), (4160, 768), (3072, 768)),
        (Linear(), (65536, 64), (64, 64)),
        (Conv((1, 1), (1, 1), (1, 1), 1), (32, 64, 32, 32), (64, 64, 3, 3)),
        (Conv((2, 2), (1, 1), (1, 1), 2), (32, 64, 32, 32), (64, 32, 3, 3)),
        (Conv((1, 1), (1, 1), (1, 1), 32), (32, 32, 16, 16), (32, 1, 3, 3)),
    ],
)
def test_honest_answers_of_a_cuda_device_pass(product, x, w, dtype):
    compute, keys = TorchCompute(torch.device("cuda")), KeySchedule()
    generator = torch.Generator().manual_seed(0)
    shapes = (x, w, output_shape(product, x, w))
    x, w, g = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    y, dx, dw = (torch.empty_like(t) for t in (g, x, w))
    compute.forward(product, x, w, y)
    compute.input_gradient(product, g, w, dx)
    compute.weight_gradient(product, g, x, dw)
    source = WeightCheck(product, w, keys.fresh(0, "w")).forward(x, keys.fresh(0, "x"), keep=True)
    gradient = source.backward(g, want_dx=True, want_dw=True)
    found = {"y": source.output(y), "dx": gradient.input_gradient(dx), "dw": gradient.weight_gradient(dw)}
    assert all(residual.passed for residual in found.values()), found

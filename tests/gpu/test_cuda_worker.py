"""What needs a CUDA device: a worker on it, against plain PyTorch. Run with ``make test-gpu``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tempo
from tempo import schemes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", [n for n in schemes.names() if not schemes.create(n).traits.exact])
def test_a_cuda_worker_gives_the_numbers_of_plain_pytorch(scheme, wire_dtype):
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 64, 1), nn.Flatten(), nn.Linear(64 * 64, 128)
    )
    x = torch.randn(16, 3, 8, 8)
    small = {"mix_block": 3, "mix_row_block": 2, "insecure_small_blocks": True}  # so that `mix` takes the first layer
    fields = {"scheme": scheme, "placement": "all", "local_device": "cuda", "wire_dtype": wire_dtype}
    with tempo.connect(base="secret", **fields, **small) as session:
        protected = session.protect(copy.deepcopy(plain))
        for model in (plain, protected):
            model(x).square().mean().backward()
        assert session.stats().flops_trusted == 0
    # TF32 is off for workers unless asked for; bfloat16 rounds each product's operands and result.
    bound = 1e-5 if wire_dtype == "float32" else 3e-2
    for a, b in zip(protected.parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= bound * b.grad.norm()

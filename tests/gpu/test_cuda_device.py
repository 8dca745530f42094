"""Copies beside arithmetic on a CUDA device: nothing is read before it is there. Run with ``make test-gpu``."""

from __future__ import annotations

import pytest
import torch

from tempo.wire.memory import PrivatePool
from tempo.wire.messages import Conv, Linear
from tempo.worker.compute import TorchCompute
from tempo.worker.device import Cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_blocks_are_pinned():
    device = Cuda(torch.device("cuda"))
    assert PrivatePool(allocate=device.allocate).take(1 << 20).tensor((1 << 18,), torch.float32).is_pinned()


@pytest.mark.parametrize(
    ("product", "x", "w"),
    [
        (Linear(), (4096, 1024), (1024, 1024)),
        (Conv((1, 1), (1, 1), (1, 1), 1), (32, 64, 32, 32), (64, 64, 3, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_queued_ahead_gives_the_numbers_of_one_at_a_time(product, x, w, dtype):
    """As the executor does it: upload, queue, mark; and download once a mark is reached, several requests later."""
    device = Cuda(torch.device("cuda"))
    compute, pool = TorchCompute(device), PrivatePool(allocate=device.allocate)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(w, generator=generator).to(dtype)
    inputs = [torch.randn(x, generator=generator).to(dtype) for _ in range(8)]
    block = pool.take(inputs[0].nbytes)
    pinned = block.tensor(x, dtype)  # one for all: it may be written again as soon as `upload` returns
    with device.working():
        there = device.upload(weight)
        waiting, found = [], []
        for operand in inputs:
            out = pool.take(operand.nbytes).tensor(operand.shape, dtype)
            room = device.room(out)
            compute.forward(product, device.upload(pinned.copy_(operand)), there, room)
            waiting.append((device.mark(), room, out))
        for reached, room, out in waiting:
            reached()
            device.download(room, out)
            found.append(out)
    host = TorchCompute(torch.device("cpu"))
    for operand, actual in zip(inputs, found, strict=True):
        expected = torch.empty_like(operand)
        host.forward(product, operand, weight, expected)
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)

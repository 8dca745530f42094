"""Products mod p on a CUDA device have the bits that a CPU's have. Run with ``make test-gpu``."""

from __future__ import annotations

import pytest
import torch

from tempo.wire.residues import HALF
from tempo.worker.modular import Doubles, Limbs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("way", [Doubles, Limbs])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.int8), (12, torch.int16)])
@pytest.mark.parametrize(("t", "k", "n"), [(1, 7, 5), (300, 768, 1000), (17, 8199, 3), (0, 8, 8)])
def test_a_cuda_device_gives_the_same_bits(way, transposed, bits, dtype, t, k, n):
    largest = (1 << (bits - 1)) - 1
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-HALF, HALF + 1, (t, k), generator=generator).to(torch.int32)
    w = torch.randint(-largest, largest + 1, (n, k) if transposed else (k, n), generator=generator).to(dtype)
    found = {}
    for device in "cpu", "cuda":
        b = w.to(device)
        found[device] = torch.empty(t, n, dtype=torch.int32, device=device)
        way(b.t() if transposed else b, largest).multiply(a.to(device), found[device])
    assert torch.equal(found["cuda"].cpu(), found["cpu"])

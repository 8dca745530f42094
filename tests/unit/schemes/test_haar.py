"""Random matrices against the statistics of the distributions they claim. Bounds are six standard deviations."""

from __future__ import annotations

import pytest
import torch

from tempo import kernels
from tempo.keys import Keystream
from tempo.schemes import haar


def stream(name: str) -> Keystream:
    """A fixed key: these tests either always pass or never do."""
    return Keystream(name.encode().ljust(32, b"\0"))


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6}


@pytest.mark.parametrize("name", kernels.available())
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 16, 100_001])
@DTYPES
def test_gaussians_are_those_of_box_and_muller(count, name, dtype):
    """Of uniforms in the order in which they come: all radii, then all angles."""
    even = count + count % 2
    if dtype == torch.float64:
        u = haar.uniforms(stream("gauss"), even)
    else:
        u = torch.from_numpy((stream("gauss").read(4 * even).view("uint32") + 0.5) / 2**32)
    radius, angle = (-2 * u[: even // 2].log()).sqrt(), 2 * torch.pi * u[even // 2 :]
    expected = torch.cat([radius * angle.sin(), radius * angle.cos()])[:count].to(dtype)
    with kernels.using(name):
        found = haar.gaussians(stream("gauss"), count, dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * ROUNDING[dtype])


def test_gaussians_far_out_are_as_exact():
    """The smallest and the largest uniform numbers, at every eighth of a turn."""
    words = torch.tensor([0, -1, 1 << 12, -1 << 12], dtype=torch.int64).repeat_interleave(8)
    angles = torch.arange(8).mul(1 << 60).mul(2).repeat(4)
    expected = None
    for name in reversed(kernels.available()):
        with kernels.using(name):

            class Known(Keystream):
                def read(self, count):
                    return torch.cat([words, angles]).numpy().view("uint8")

            found = haar.gaussians(Known(bytes(32)), 64)
        expected = found if expected is None else expected  # PyTorch's
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-14)
    assert float(expected.abs().max()) > 8


def test_single_precision_gaussians_far_out_and_near_zero_are_as_exact():
    """Words next to both ends and to one half, at every eighth of a turn and next to it."""
    ends = torch.tensor([0, 1, 2, 3, -1, -2, 1 << 31, (1 << 31) - 1, 0x4AFB0CCC, 0x4AFB0CCD, -(1 << 24), 1 << 24])
    eighths = torch.cat([torch.arange(8) * (1 << 29) + i for i in (-1, 0, 1)])
    words = torch.cat([ends.repeat_interleave(len(eighths)), eighths.repeat(len(ends))]).numpy().astype("uint32")

    class Known(Keystream):
        def read(self, count):
            return words.view("uint8").copy()

    u = torch.from_numpy((words + 0.5) / 2**32)
    radius, angle = (-2 * u[: len(u) // 2].log()).sqrt(), 2 * torch.pi * u[len(u) // 2 :]
    expected = torch.cat([radius * angle.sin(), radius * angle.cos()]).float()
    for name in kernels.available():
        with kernels.using(name):
            found = haar.gaussians(Known(bytes(32)), len(words), torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    assert float(expected.abs().max()) > 6.7


@pytest.mark.parametrize("side", [1, 2, 5, 16, 33, 70])
@DTYPES
def test_orthogonal_blocks_are_the_same_with_every_instruction_set(side, dtype):
    with kernels.using(kernels.TORCH):
        expected = haar.orthogonal(stream("same"), 19, side, dtype)
    for name in kernels.available():
        with kernels.using(name):
            found = haar.orthogonal(stream("same"), 19, side, dtype)
        torch.testing.assert_close(found, expected, rtol=0, atol=10 * ROUNDING[dtype])


@pytest.mark.parametrize("side", [1, 3, 16, 37])
def test_single_precision_blocks_are_the_exact_product_of_their_reflections(side):
    """What draws them is Haar distributed in exact arithmetic; so is the result, but for rounding."""
    words = stream("exact")
    numbers = haar.gaussians(words, 9 * side * (side + 1) // 2, torch.float32)
    with pytest.MonkeyPatch.context() as patch, kernels.using(kernels.TORCH):
        patch.setattr(haar, "gaussians", lambda *_: numbers.double())
        exact = haar.orthogonal(words, 9, side)
    for name in kernels.available():
        with kernels.using(name):
            found = haar.orthogonal(stream("exact"), 9, side, torch.float32)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-6)


@DTYPES
def test_gaussians_have_the_moments_of_gaussians(dtype):
    count = 200_001
    z = haar.gaussians(stream("gauss"), count, dtype).double()
    assert len(z) == count
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 6 * (variance / count) ** 0.5
    half = count // 2
    assert abs(float((z[:half] * z[half + 1 :]).mean())) < 6 / half**0.5  # the two of a pair are independent


@pytest.mark.parametrize("side", [1, 2, 5, 32, 250])
@DTYPES
def test_orthogonal_blocks_are_orthogonal(side, dtype):
    q = haar.orthogonal(stream("orthogonal"), 2000 // side, side, dtype).double()
    assert float((q @ q.mT - torch.eye(side, dtype=q.dtype)).abs().max()) < ROUNDING[dtype]


@DTYPES
def test_entries_have_the_mean_and_variance_of_haar_matrices(dtype):
    count, side = 4000, 8
    q = haar.orthogonal(stream("entries"), count, side, dtype).double()
    # Of an entry: mean 0, variance 1/n, fourth moment 3/(n(n+2)).
    assert float(q.mean(0).abs().max()) < 6 * (1 / side / count) ** 0.5
    spread = (3 / (side * (side + 2)) - 1 / side**2) / count
    assert float(((q**2).mean(0) - 1 / side).abs().max()) < 6 * spread**0.5


@DTYPES
def test_traces_and_determinants_are_those_of_haar_matrices(dtype):
    # Over O(n): E tr = 0, E tr² = 1, E tr⁴ = 3, E tr(Q²) = 1, and both signs of the determinant are as likely. QR
    # without the sign fix fails the first.
    count, side = 8000, 8
    q = haar.orthogonal(stream("traces"), count, side, dtype).double()
    trace = q.diagonal(dim1=1, dim2=2).sum(1)
    square = (q * q.mT).sum((1, 2))
    for values, expected in ((trace, 0), (trace**2, 1), (trace**4, 3), (square, 1), (torch.linalg.det(q), 0)):
        assert abs(float(values.mean()) - expected) < 6 * float(values.std()) / count**0.5


@DTYPES
def test_entries_are_tied_to_each_other_as_those_of_haar_matrices(dtype):
    # Weingarten's formulas for a 2×2 minor: independent entries, or a bias towards any direction, would break these.
    count, side = 20_000, 6
    q = haar.orthogonal(stream("minors"), count, side, dtype).double()
    scale = side * (side - 1) * (side + 2)
    for i, j in ((0, 1), (0, side - 1), (side - 2, side - 1)):
        squares = q[:, i, i] ** 2 * q[:, j, j] ** 2
        cycle = q[:, i, i] * q[:, j, j] * q[:, i, j] * q[:, j, i]
        for values, expected in ((squares, (side + 1) / scale), (cycle, -1 / scale)):
            assert abs(float(values.mean()) - expected) < 6 * float(values.std()) / count**0.5


@DTYPES
def test_eigenphases_repel_each_other_and_are_spread_evenly(dtype):
    count, side = 2000, 9
    q = haar.orthogonal(stream("phases"), count, side, dtype).double()
    q = q[torch.linalg.det(q) > 0]  # SO(9): one eigenvalue 1, four conjugate pairs
    phases = torch.linalg.eigvals(q).angle().sort(1).values[:, 5:]  # the pairs' phases in (0, π)
    # The density of a pair's phase on SO(2m+1) by Weyl's formula, through its first cosine moment: E Σ 2cosθ + 1 = 0.
    total = 2 * phases.cos().sum(1) + 1
    assert abs(float(total.mean())) < 6 * float(total.std()) / len(q) ** 0.5
    # Independent phases would come within 1% of the mean gap in about 4% of matrices; repelling ones hardly ever.
    closest = phases.diff(dim=1).min(1).values
    assert float((closest < 0.01 * torch.pi / 4).double().mean()) < 0.002


@pytest.mark.parametrize("condition", [1.5, 4.0, 16.0])
def test_general_blocks_keep_their_condition_number(condition):
    m, inverse = haar.blocks(stream("general"), 200, 16, condition)
    assert float((m @ inverse - torch.eye(16, dtype=m.dtype)).abs().max()) < 1e-12
    found = torch.linalg.cond(m)
    assert float(found.max()) <= condition * (1 + 1e-9)
    assert float(found.median()) > condition**0.6
    sigma = torch.linalg.svdvals(m).log()
    assert abs(float(sigma.mean())) < 6 * float(sigma.std()) / sigma.numel() ** 0.5

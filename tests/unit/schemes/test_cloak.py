"""The cloak on a weight: taken off exactly, inside the spectrum of what it covers, and not to be truncated away."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import plain, run, targets
from torch import Tensor

from tempo import kernels
from tempo.keys import KeySchedule, Keystream
from tempo.schemes import cloak
from tempo.schemes.mix import Mix
from tempo.schemes.mix_tuned import MixTuned
from tempo.wire.messages import Conv, Linear

UNHURRIED = settings(deadline=None, max_examples=30)
DOUBLE = torch.float64


def stream() -> Keystream:
    return KeySchedule().fresh(1, "test").stream("cloak")


def weight(kind: str, outputs: int, inputs: int, seed: int = 0) -> Tensor:
    """A random weight; one with the singular values of trained ones; one of nothing but a rotation; a pruned one."""
    w = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    u, sigma, v = torch.linalg.svd(w, full_matrices=False)
    steps = torch.arange(1, len(sigma) + 1)
    match kind:
        case "power law":
            sigma = steps**-0.5
        case "steep":
            sigma = 1.0 / steps
        case "spikes":  # a bulk of noise under a few large directions
            sigma[: len(sigma) // 16] *= 6
        case "rotation":
            sigma = torch.ones(len(sigma))
        case "deficient":
            sigma[len(sigma) // 2 :] = 0
    return (u * sigma) @ v


KINDS = ["random", "power law", "steep", "spikes", "rotation", "deficient"]


@UNHURRIED
@given(st.sampled_from(KINDS), st.integers(2, 150), st.integers(2, 150), st.integers(1, 24), st.integers(0, 99))
def test_its_singular_values_lie_within_those_of_the_weight(kind, outputs, inputs, rank, seed):
    w = weight(kind, outputs, inputs, seed)
    found = cloak.draw(stream(), Linear(), w, rank)
    sigma = torch.linalg.svdvals(w.double())
    own = torch.linalg.svdvals((found.U @ found.V).double())[: min(rank, outputs, inputs)]
    slack = 1e-4 * float(sigma[0])
    assert float(own[0]) <= float(sigma[0]) + slack
    assert float(own[-1]) >= float(sigma[-1]) - slack
    assert float(own[0]) > 0


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize("shape", [(6, 30000), (5, 40), (40, 5), (3, 17), (17, 3), (4, 4), (1, 9), (9, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_as_many_steps_as_directions_find_all_singular_values(kernel, shape, transposed):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if transposed:
        w = w.t().contiguous().t()
    with kernels.using(kernel):
        nodes, weights = cloak.spectrum(stream(), w.unsqueeze(0))
    torch.testing.assert_close(nodes[0], torch.linalg.svdvals(w.double()).flip(0), rtol=1e-4, atol=1e-4)
    assert float(weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("kernel", kernels.available())
def test_directions_that_are_not_there_have_no_share(kernel):
    w = torch.diag(torch.tensor([0.0] * 30 + [2.0] * 30))[:, :50]
    with kernels.using(kernel):
        nodes, weights = cloak.spectrum(stream(), w.unsqueeze(0))
    inside = (nodes - 2).abs().minimum(nodes) < 1e-3
    assert float(weights[~inside].sum()) < 1e-6


def left_after_truncation(w: Tensor, c: Tensor, leading: int) -> float:
    """Share of the cloak's energy outside the leading singular directions of the weight under it."""
    u, _, v = torch.linalg.svd(w + c, full_matrices=False)
    removed = u[:, :leading].T @ c @ v[:leading].T
    return 1 - float(removed.square().sum() / c.square().sum())


@pytest.mark.parametrize("kind", ["random", "power law", "steep", "spikes"])
@pytest.mark.parametrize("shape", [(384, 384), (576, 192)])
def test_dropping_leading_singular_directions_does_not_remove_it(kind, shape):
    w = weight(kind, *shape)
    found = cloak.draw(stream(), Linear(), w, 16)
    assert left_after_truncation(w, found.U @ found.V, 16) > 0.9
    # The control: one four times as strong as the weight goes with them.
    strong = found.U @ found.V
    strong *= 4 * w.norm() / strong.norm()
    assert left_after_truncation(w, strong, 16) < 0.05


def test_the_spectrum_is_that_of_the_matrix():
    w = weight("power law", 200, 120)
    nodes, shares = cloak.spectrum(stream(), w[None], steps=40)
    sigma = torch.linalg.svdvals(w.double())
    assert abs(float(shares.sum()) - 1) < 1e-6
    assert float(nodes[0, -1]) == pytest.approx(float(sigma[0]), rel=1e-3)
    assert float(nodes[0, 0]) >= float(sigma[-1]) * (1 - 1e-4)
    # One vector estimates the mean square within 34%, by Σσ⁴ and Σσ²; the mean of a hundred within 3.4%.
    drawn = [cloak.spectrum(stream(), w[None]) for _ in range(100)]
    energy = sum(float((shares * nodes**2).sum()) for nodes, shares in drawn) / len(drawn)
    assert energy == pytest.approx(float(sigma.square().mean()), rel=6 * 0.034)


def test_a_weight_of_zeros_gets_none():
    found = cloak.draw(stream(), Linear(), torch.zeros(40, 50), 16)
    assert not (found.U @ found.V).any()


@pytest.mark.parametrize("operators", [("one",), ("one", "one"), ("one", "other")])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (DOUBLE, 1e-13)])
def test_linear_answers_are_those_of_the_weight_without_it(operators, dtype, bound):
    torch.manual_seed(0)
    x, w = torch.randn(70, 96, dtype=dtype), torch.randn(130, 96, dtype=dtype)
    y, g, dx, dw = plain(Linear(), x, w)
    found = run(MixTuned(), x, w, g, workers=targets(*operators))
    for actual, expected in ((found.y, y), (found.dx, dx), (found.dw, dw)):
        assert float((actual - expected).norm() / expected.norm()) <= bound


@UNHURRIED
@given(st.data(), st.integers(1, 3), st.integers(1, 2), st.sampled_from([Mix, MixTuned]))
def test_convolutions_of_any_geometry(data, groups, axes, kind):
    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(axes))

    torch.manual_seed(0)
    product = Conv(sizes(1, 3), sizes(0, 2), sizes(1, 2), groups)
    kernel = sizes(1, 3)
    inputs, outputs = groups * data.draw(st.integers(2, 5)), groups * data.draw(st.integers(2, 5))
    x = torch.randn(data.draw(st.integers(1, 4)), inputs, *[7] * axes, dtype=DOUBLE)
    w = torch.randn(outputs, inputs // groups, *kernel, dtype=DOUBLE)
    y, g, dx, dw = plain(product, x, w)
    scheme = kind(2, 2, cloak=2, dense_below=0, insecure_small_blocks=True)
    found = run(scheme, x, w, g, product, targets(*data.draw(st.sampled_from([("a",), ("a", "b")]))))
    for actual, expected in ((found.y, y), (found.dx, dx), (found.dw, dw)):
        assert float((actual - expected).norm()) <= 1e-13 * float(
            x.norm() * w.norm() + g.norm() * (w.norm() + x.norm())
        )


def test_what_a_worker_holds_is_the_weight_under_the_cloak():
    torch.manual_seed(0)
    x, w = torch.randn(64, 96, dtype=DOUBLE), torch.randn(128, 96, dtype=DOUBLE)
    g = torch.randn(64, 128, dtype=DOUBLE)
    sigma = torch.linalg.svdvals(w)
    for scheme, same in ((Mix(cloak=0, insecure_small_blocks=True), True), (Mix(), False), (MixTuned(), False)):
        seen = torch.linalg.svdvals(run(scheme, x, w, g).seen["w"][0])  # all that rotations leave
        assert (float((seen - sigma).norm() / sigma.norm()) < 1e-12) == same

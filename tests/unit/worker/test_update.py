"""Rules are PyTorch's optimizers, bit for bit where it has them, and commute with the masks that they may run under."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torch import Tensor, nn

from tempo.wire.messages import Adam, Lion, Muon, Rule, Sgd
from tempo.worker.update import STATES, apply, check, orthogonalised, states

STEPS = 20
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def at(rule: Rule, step: int) -> Rule:
    return replace(rule, steps=step) if isinstance(rule, Adam) else rule


def sgd(**changes: Any) -> Sgd:
    plain = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    return Sgd(**plain | changes)


def adam(**changes: Any) -> Adam:
    plain = {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.0, "decoupled": False}
    return Adam(**plain | {"amsgrad": False, "maximize": False, "steps": 0} | changes)


def muon(**changes: Any) -> Muon:
    plain = {"lr": 0.1, "adjusted_lr": 0.13, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True}
    return Muon(**plain | {"coefficients": COEFFICIENTS, "eps": 1e-7, "iterations": 5} | changes)


SGD = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "maximize": True},
]
ADAM = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "amsgrad": True},
    {"weight_decay": 0.1, "amsgrad": True, "maximize": True},
]


def torch_sgd(options: dict[str, Any], p: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD([p], lr=0.1, **options)


def torch_adam(options: dict[str, Any], p: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.Adam([p], lr=0.1, betas=(0.8, 0.95), eps=1e-6, **options)


def torch_adamw(options: dict[str, Any], p: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p], lr=0.1, betas=(0.8, 0.95), eps=1e-6, **{"weight_decay": 0.0} | options)


THEIRS = [
    *[(sgd(**options), options, torch_sgd) for options in SGD],
    *[(adam(**options), options, torch_adam) for options in ADAM],
    *[(adam(decoupled=True, **options), options, torch_adamw) for options in ADAM],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rule", "options", "build"), THEIRS, ids=lambda value: getattr(value, "__name__", None))
def test_rules_are_pytorch_s_optimizers_bit_for_bit(
    rule: Rule, options: dict[str, Any], build: Callable[..., torch.optim.Optimizer], dtype: torch.dtype
) -> None:
    w, state = random(7, 5, seed=0, dtype=dtype), {}
    p = nn.Parameter(w.clone())
    optimizer = build(options, p)
    for step in range(STEPS):
        gradient = random(7, 5, seed=1 + step, dtype=dtype)
        p.grad = gradient.clone()
        optimizer.step()
        apply(at(rule, step), w, gradient, state)
        assert torch.equal(gradient, p.grad)
    assert torch.equal(w, p)
    theirs = {name: kept for name, kept in optimizer.state[p].items() if name in STATES}
    assert set(state) == set(states(rule)) == {name for name, kept in theirs.items() if kept is not None}
    assert all(torch.equal(state[name], theirs[name]) for name in state)


def test_lion_is_the_algorithm_as_printed() -> None:
    rule, state = Lion(lr=0.1, beta1=0.8, beta2=0.95, weight_decay=0.2), {}
    w = random(7, 5, seed=0)
    expected, m = w.clone(), torch.zeros_like(w)
    for step in range(STEPS):
        g = random(7, 5, seed=1 + step)
        apply(rule, w, g, state)
        expected = expected - 0.1 * ((0.8 * m + 0.2 * g).sign() + 0.2 * expected)
        m = 0.95 * m + 0.05 * g
    torch.testing.assert_close(w, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state, {"exp_avg": m}, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_muon_is_pytorch_s_but_for_its_rounding_to_bfloat16(
    shape: tuple[int, int], nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def theirs() -> Tensor:
        p = nn.Parameter(random(*shape, seed=0))
        optimizer = torch.optim.Muon([p], lr=0.1, momentum=0.9, nesterov=nesterov)
        for step in range(STEPS):
            p.grad = random(*shape, seed=1 + step)
            optimizer.step()
        return p.detach()

    w, state = random(*shape, seed=0), {}
    rule = muon(adjusted_lr=0.1 * max(1, shape[0] / shape[1]) ** 0.5, nesterov=nesterov)
    for step in range(STEPS):
        apply(rule, w, random(*shape, seed=1 + step), state)
    rounded = theirs()
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)  # with which their iteration begins
    torch.testing.assert_close(w, theirs(), rtol=1e-11, atol=1e-11)
    assert 1e-4 < (w - rounded).norm() / w.norm() < 0.02


# --- laws ---

SEEDS = st.integers(0, 2**31)
ELEMENTWISE = [
    *(sgd(**options) for options in SGD),
    *(adam(decoupled=decoupled, **options) for options in ADAM for decoupled in (False, True)),
    Lion(lr=0.1, beta1=0.8, beta2=0.95, weight_decay=0.2),
]
ROTATING = [*(sgd(**options) for options in SGD), muon(), muon(nesterov=False)]


def train(rule: Rule, w: Tensor, gradients: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    w, state = w.clone(), {}
    for step, gradient in enumerate(gradients):
        apply(at(rule, step), w, gradient.clone(), state)
    return w, state


def signed_permutation(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(0, 2, (n,), generator=generator).double() - 1
    matrix = torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    return signs[:, None] * matrix, matrix


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(ELEMENTWISE), SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_elementwise_rules_commute_with_signed_permutations(rule: Rule, seed: int, m: int, d: int) -> None:
    (p, p_unsigned), (q, q_unsigned) = signed_permutation(m, seed), signed_permutation(d, seed + 1)
    w, gradients = random(m, d, seed=seed), [random(m, d, seed=seed + 1 + step) for step in range(5)]
    plain, state = train(rule, w, gradients)
    masked, state_masked = train(rule, p @ w @ q, [p @ gradient @ q for gradient in gradients])
    torch.testing.assert_close(masked, p @ plain @ q, rtol=1e-12, atol=1e-12)
    assert set(state_masked) == set(state)
    for name, kept in state.items():
        expected = p_unsigned @ kept @ q_unsigned if name.endswith("_sq") else p @ kept @ q
        torch.testing.assert_close(state_masked[name], expected, rtol=1e-12, atol=1e-12)


def rotation(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(n, n, seed=seed)).Q


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(ROTATING), SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_descent_and_muon_commute_with_rotations(rule: Rule, seed: int, m: int, d: int) -> None:
    p, q = rotation(m, seed), rotation(d, seed + 1)
    w, gradients = random(m, d, seed=seed), [random(m, d, seed=seed + 1 + step) for step in range(5)]
    plain, state = train(rule, w, gradients)
    masked, state_masked = train(rule, p @ w @ q, [p @ gradient @ q for gradient in gradients])
    torch.testing.assert_close(masked, p @ plain @ q, rtol=1e-12, atol=1e-12)
    for name, kept in state.items():
        torch.testing.assert_close(state_masked[name], p @ kept @ q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [adam(), Lion(lr=0.1, beta1=0.8, beta2=0.95, weight_decay=0.0)])
def test_adam_and_lion_do_not_commute_with_rotations(rule: Rule) -> None:
    """The control: what the law above can tell."""
    p, w, gradients = rotation(6, 0), random(6, 4, seed=1), [random(6, 4, seed=2)]
    plain, masked = train(rule, w, gradients)[0], train(rule, p @ w, [p @ gradients[0]])[0]
    assert (masked - p @ plain).norm() > 0.1


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(1, 6), st.integers(0, 6))
def test_orthogonalising_changes_singular_values_alone(seed: int, m: int, d: int, iterations: int) -> None:
    matrix = random(m, d, seed=seed)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / s.norm()
    for _ in range(iterations):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(
        orthogonalised(matrix, COEFFICIENTS, iterations, 1e-7), u @ torch.diag(s) @ vh, rtol=1e-10, atol=1e-10
    )


# --- what is refused before ---


@pytest.mark.parametrize(
    ("rule", "w", "why"),
    [
        (sgd(lr=float("nan")), torch.ones(2, 2), "Sgd with lr nan"),
        (adam(eps=float("inf")), torch.ones(2, 2), "Adam with eps inf"),
        (adam(beta2=1.0), torch.ones(2, 2), r"beta2 1\.0, which is not in \[0, 1\)"),
        (muon(coefficients=(1.0, float("-inf"), 1.0)), torch.ones(2, 2), "Muon with coefficients"),
        (muon(), torch.ones(2, 2, 2), "Muon is for matrices, the weight has 3 axes"),
        (sgd(), torch.ones(2, 2, dtype=torch.int64), "Sgd on a weight of torch.int64"),
    ],
)
def test_what_cannot_be_applied_is_said(rule: Rule, w: Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check(rule, w)


@pytest.mark.parametrize("rule", [*ELEMENTWISE, *ROTATING])
def test_what_can_be_applied_passes(rule: Rule) -> None:
    check(rule, torch.ones(2, 2))

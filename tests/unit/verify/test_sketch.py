"""Sketches follow the weights of honest workers, and no others."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from answering import KEYS
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from scipy import stats
from torch import Tensor

from tempo.schemes.masks import IDENTITY, Mask, Masks, draw_blocks
from tempo.schemes.operators import Gather
from tempo.verify.checks import WeightCheck
from tempo.verify.sketch import Sketch
from tempo.verify.tolerance import FALSE_ALARM, between
from tempo.wire.messages import Adam, Linear, Lion, Muon, Sgd
from tempo.worker.update import apply

KINDS = ["mix", "two rounds", "signed", "none"]


def rule(lr=0.1, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False) -> Sgd:
    return Sgd(lr, momentum, dampening, weight_decay, nesterov, maximize)


MOMENTUM = rule(momentum=0.9, weight_decay=5e-4)
RULES = {
    "plain": rule(),
    "decay": rule(weight_decay=0.3),
    "momentum": rule(momentum=0.9),
    "dampening": rule(momentum=0.8, dampening=0.3, weight_decay=0.1),
    "nesterov": rule(momentum=0.9, nesterov=True, weight_decay=0.1),
    "maximize": rule(momentum=0.5, maximize=True, weight_decay=0.1),
}


def mask(kind: str, size: int) -> Mask:
    stream = KEYS.fresh(0, "mask").stream("mask")
    if kind == "none" or size == 0:
        return IDENTITY
    if kind == "signed":
        index = torch.from_numpy(stream.permutation(size)).int()
        return Mask((Gather(index, torch.from_numpy(2 * stream.integers(0, 1, size) - 1).double()),))
    return draw_blocks(stream, size, min(8, size), 2 if kind == "two rounds" else 1, 1.0)


def as_computed(step: Sgd, dtype: torch.dtype) -> Sgd:
    """PyTorch takes a rate in the dtype of what it is multiplied with: float32 knows no 0.1."""
    numbers = {name: getattr(step, name) for name in ("lr", "momentum", "weight_decay")}
    return structs.replace(step, **{name: float(torch.tensor(n, dtype=dtype)) for name, n in numbers.items()})


class Job:
    """A weight at a worker, its sketch, and the same weight in plain training, in float64."""

    def __init__(self, m: int, d: int, kind: str = "mix", dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.dtype, self.kind = dtype, kind
        self.generator = torch.Generator().manual_seed(seed)
        self.A, self.P = mask(kind, d), mask(kind, m)
        self.w = self.masked("w", self.randn(m, d) / d**0.5)
        self.plain = torch.empty(m, d, dtype=torch.float64)
        Masks(A=self.A, P=self.P).decode("w", self.w.double(), [self.plain])
        self.gradient: Tensor | None = None
        self.plain_gradient = torch.zeros_like(self.plain)
        self.state: dict[str, Tensor] = {}
        self.plain_state: dict[str, Tensor] = {}
        self.towards = self.randn(d, m)
        self.store()

    def store(self) -> None:
        """The weight, and what the worker kept of it, are sent."""
        self.sketch = Sketch(self.w, KEYS.fresh(0, "w"), self.state, self.gradient)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def masked(self, role: str, plain: Tensor, L: Mask = IDENTITY) -> Tensor:
        out = torch.empty_like(plain)
        Masks(L, self.A, self.P).encode(role, plain, out)
        return out

    def batch(self, rows: int = 64, relative: float = 1e-3) -> tuple[Tensor, Tensor]:
        """``X`` and ``G`` of rows with something in common; ``0.1 dW`` is ``relative`` of the weight."""
        x = self.randn(rows, self.plain.shape[1]) + self.randn(1, self.plain.shape[1])
        g = x @ self.towards / len(self.towards) ** 0.5 + self.randn(rows, len(self.plain))
        return x, g * (10 * relative * self.plain.norm() / (g.t() @ x).norm()).to(self.dtype)

    def accumulate(self, x: Tensor, g: Tensor) -> None:
        L = mask(self.kind, len(x))
        dw = self.masked("g", g, L).t() @ self.masked("x", x, L)
        self.gradient = dw if self.gradient is None else self.gradient.add_(dw)
        self.plain_gradient = self.plain_gradient + g.double().t() @ x.double()
        self.sketch.accumulate(x, g, Masks(L, self.A, self.P))

    def update(self, step: Sgd, scale: float = 1.0) -> None:
        apply(step, self.w, self.gradient.mul_(scale), self.state)
        apply(as_computed(step, self.dtype), self.plain, self.plain_gradient * scale, self.plain_state)
        self.gradient, self.plain_gradient = None, torch.zeros_like(self.plain)
        self.sketch.update(step, scale)

    def step(self, step: Sgd, rows: int = 64, relative: float = 1e-3) -> None:
        self.accumulate(*self.batch(rows, relative))
        self.update(step)

    def residuals(self, rows: int = 64, w: Tensor | None = None) -> tuple[float, float]:
        """What checks of the next output and input gradient find, of a worker that multiplies by ``w``."""
        w = self.w if w is None else w
        x, g = self.batch(rows)
        L = mask(self.kind, rows)
        x, g = self.masked("x", x, L), self.masked("g", g, L)
        check = self.sketch.check.forward(x, KEYS.fresh(0, "x"), keep=False)
        found = check.output(x @ w.t())
        return found.ratio, check.backward(g, want_dx=True, want_dw=False).input_gradient(g @ w).ratio


# --- laws, in float64 ---------------------------------------------------------------------------------------------


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm()) <= 1e-12 * max(1.0, float(expected.norm()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_sketches_are_those_of_plain_training(name, kind):
    job = Job(24, 40, kind, torch.float64)
    check = job.sketch.check
    for step in range(12):
        for rows in (8, 11, 30)[: 1 + step % 3]:
            job.accumulate(*job.batch(rows, 0.1))
        job.update(RULES[name], 1.0 if step % 4 else 0.25)
        w = job.masked("w", job.plain)
        assert close(job.w, w)
        assert close(check.from_outputs, check.r[0] @ w)
        assert close(check.from_inputs, check.v[0] @ w.t())
        assert job.sketch.compare("w", w).passed
        for kept, plain in job.plain_state.items():
            assert job.sketch.compare(kept, job.masked("w", plain)).passed


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_gradient_is_seen_through_any_masks(data):
    """Sizes of all kinds, masks of rows and features of different kinds, and rows of nothing but zeros."""
    m, d, rows = (data.draw(st.integers(8, 70)) for _ in range(3))
    job = Job(m, d, data.draw(st.sampled_from(KINDS)), torch.float64, data.draw(st.integers(0, 99)))
    job.P = mask(data.draw(st.sampled_from(KINDS)), m)
    plain = torch.zeros(m, d, dtype=torch.float64)
    for _ in range(data.draw(st.integers(1, 3))):
        x, g = job.batch(rows)
        dead = data.draw(st.integers(0, rows))
        g[:dead] = 0  # parts without a gradient count for nothing
        x[: dead // 2] = 0
        plain += g.t() @ x
        job.sketch.accumulate(x, g, Masks(mask(data.draw(st.sampled_from(KINDS)), rows), job.A, job.P))
    masked = job.masked("dw", plain)
    assert job.sketch.compare("gradient", masked).passed
    assert job.sketch.plausible(float(masked.norm()))
    masked[0, 0] += 1e-9 * (1 + masked.norm())
    assert not job.sketch.compare("gradient", masked).passed


def test_what_was_kept_before_goes_on():
    """Momentum and half a gradient are stored with a weight."""
    job = Job(24, 40, dtype=torch.float64)
    for _ in range(3):
        job.step(MOMENTUM)
    job.accumulate(*job.batch())
    job.store()
    assert job.sketch.check.drift == 0
    assert job.sketch.compare("gradient", job.gradient).passed
    job.accumulate(*job.batch())
    assert job.sketch.plausible(float(job.gradient.norm()))
    job.update(MOMENTUM)
    assert job.sketch.compare("w", job.w).passed
    assert job.sketch.compare("momentum_buffer", job.state["momentum_buffer"]).passed
    assert max(job.residuals()) < 1


def test_no_rows_are_no_gradient():
    job = Job(24, 40)
    job.sketch.accumulate(torch.zeros(0, 40), torch.zeros(0, 24), Masks(A=job.A, P=job.P))
    assert job.sketch.compare("gradient", torch.zeros(24, 40)).passed
    assert not job.sketch.compare("gradient", 1e-20 * torch.ones(24, 40)).passed
    job.sketch.update(rule())
    assert job.sketch.compare("w", job.w).passed


def test_a_gradient_that_is_dropped_counts_for_nothing():
    job = Job(24, 40, dtype=torch.float64)
    job.accumulate(*job.batch())
    job.sketch.discard()
    with pytest.raises(ValueError, match="no gradient"):
        job.sketch.update(rule())
    with pytest.raises(ValueError, match="no gradient"):
        job.sketch.bounds()
    job.gradient, job.plain_gradient = None, torch.zeros_like(job.plain)
    job.accumulate(*job.batch())
    job.update(rule())
    assert job.sketch.compare("w", job.masked("w", job.plain)).passed


@pytest.mark.parametrize(
    "other",
    [
        Adam(0.1, 0.9, 0.99, 1e-8, 0.0, False, False, False, 0),
        Lion(0.1, 0.9, 0.99, 0.0),
        Muon(0.1, 0.1, 0.0, 0.9, True, (3.4, -4.7, 2.0), 1e-7, 5),
    ],
    ids=lambda other: type(other).__name__,
)
def test_no_sketch_follows_what_is_not_linear(other):
    job = Job(24, 40)
    job.accumulate(*job.batch())
    with pytest.raises(ValueError, match="not linear"):
        job.sketch.update(other)


def test_what_is_not_kept_cannot_be_compared():
    job = Job(24, 40)
    with pytest.raises(ValueError, match="exp_avg"):
        Sketch(job.w, KEYS.fresh(0, "w"), {"exp_avg": job.w})
    for name in ("gradient", "momentum_buffer", "exp_avg"):
        with pytest.raises(ValueError, match=name):
            job.sketch.compare(name, job.w)


# --- honest workers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mix", "none"])
@pytest.mark.parametrize("name", ["plain", "momentum", "nesterov"])
def test_honest_workers_are_never_rejected(name, kind):
    job, worst = Job(48, 64, kind), 0.0
    for step in range(300):
        if step % 10 == 0:
            worst = max(worst, *job.residuals())
        job.accumulate(*job.batch())
        assert job.sketch.compare("gradient", job.gradient).passed
        assert job.sketch.plausible(float(job.gradient.norm()))
        job.update(RULES[name], 0.5)
    assert worst < 0.2
    for kept in ("w", *job.state):
        found = job.sketch.compare(kept, job.w if kept == "w" else job.state[kept])
        assert found.ratio < 0.5
    # The drift bounds what rounding did, and not from far above.
    off = float((job.w - job.masked("w", job.plain)).norm())
    assert 0.1 * job.sketch.check.drift < off < job.sketch.check.drift


def same_batch(job: Job, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, g = (torch.randn(32, size, generator=generator) for size in job.plain.shape[::-1])
    return x, 1e-3 * g


def dead_features(job: Job, step: int) -> tuple[Tensor, Tensor]:
    x, g = job.batch()
    x[:, 10:] = 0
    return x, g


ALIKE = {
    "the same batch": (same_batch, rule(1e-3)),
    "the same batch, in steps near rounding": (same_batch, rule(3e-6)),
    "decay alone": (lambda job, step: (torch.zeros(1, 64), torch.zeros(1, 48)), rule(1.0, weight_decay=1e-6)),
    "decay that is lost": (lambda job, step: (torch.zeros(1, 64), torch.zeros(1, 48)), rule(1.0, weight_decay=3e-8)),
    "decay of dead features": (dead_features, rule(0.1, weight_decay=1e-5)),
    "no rate": (lambda job, step: job.batch(), rule(0.0)),
    "equal numbers": (lambda job, step: (torch.full((700, 64), 0.1), torch.full((700, 48), 0.3)), rule(1e-4)),
}


@pytest.mark.parametrize("case", ALIKE)
def test_rounding_that_repeats_is_no_lie(case):
    """Steps that are alike round alike: errors then grow with their number, not its root."""
    batch, step = ALIKE[case]
    job = Job(48, 64, "none")
    for number in range(600):
        job.accumulate(*batch(job, number))
        job.update(step)
    assert job.sketch.compare("w", job.w).ratio < 0.7
    assert max(job.residuals()) < 0.3


# --- liars --------------------------------------------------------------------------------------------------------


def stale(job: Job, before: Tensor, scale: float) -> Tensor:
    return before.clone()


def scaled(job: Job, before: Tensor, scale: float) -> Tensor:
    return before + scale * (job.w - before)


def forged(job: Job, before: Tensor, scale: float) -> Tensor:
    noise = torch.randn(before.shape, generator=job.generator)
    return job.w + scale * noise * (job.w - before).norm() / noise.norm()


LIES = {
    "skipped": (stale, 0.0),
    "a rate 1.1 times as high": (scaled, 1.1),
    "twice the rate": (scaled, 2.0),
    "ten times the rate": (scaled, 10.0),
    "the other way": (scaled, -1.0),
    "noise of half the change": (forged, 0.5),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("shape", [(384, 384), (768, 192)], ids=str)
def test_a_wrong_update_is_found_by_the_next_check(shape, lie):
    """At sizes of a small transformer, where a step changes the weight by half a per cent."""
    forge, scale = LIES[lie]
    job = Job(*shape)
    for _ in range(10):
        job.step(MOMENTUM, 256, 2e-3)
    before = job.w.clone()
    job.step(MOMENTUM, 256, 2e-3)
    false = forge(job, before, scale)
    assert 1e-3 < float((job.w - before).norm() / before.norm()) < 1e-2
    assert max(job.residuals(256)) < 0.1
    assert max(job.residuals(256, false)) > 1
    assert job.sketch.compare("w", false).ratio > 30


def test_wrong_momentum_is_found_by_the_next_check():
    job = Job(384, 384)
    for _ in range(5):
        job.step(MOMENTUM, 256)
    before, buffer = job.w.clone(), job.state["momentum_buffer"].clone()
    job.step(MOMENTUM, 256)
    apply(
        rule(momentum=0.8, weight_decay=5e-4),
        before,
        (job.state["momentum_buffer"] - 0.9 * buffer),
        {"momentum_buffer": buffer},
    )
    assert max(job.residuals(256, before)) > 1
    assert not job.sketch.compare("w", before).passed
    assert not job.sketch.compare("momentum_buffer", buffer).passed


def test_an_earlier_weight_that_comes_back_is_found():
    job = Job(384, 384)
    replayed = job.w.clone()
    for _ in range(5):
        job.step(rule(), 256)
    assert max(job.residuals(256, replayed)) > 1


def test_a_lie_in_one_element_of_what_is_fetched_is_found():
    job = Job(96, 128)
    for _ in range(20):
        job.step(MOMENTUM)
    for name, honest in (("w", job.w), ("momentum_buffer", job.state["momentum_buffer"])):
        assert job.sketch.compare(name, honest).passed
        for value in (nan, inf, float(honest[5, 7]) + 0.01 * float(honest.norm())):
            lie = honest.clone()
            lie[5, 7] = value
            found = job.sketch.compare(name, lie)
            assert not found.passed
            assert found.row == (5,)


def test_a_gradient_that_is_not_finite_may_be_fetched_as_such():
    job = Job(24, 40)
    x, g = job.batch()
    g[3, 4] = nan
    job.accumulate(x, g)
    found = job.sketch.compare("gradient", job.gradient)
    assert found.passed
    assert found.unchecked == 24
    assert not job.sketch.plausible(1.0)
    job.sketch.discard()
    job.gradient = None
    job.accumulate(*job.batch())
    assert job.sketch.compare("gradient", job.gradient).passed


def test_bounds_of_norms_are_those_of_chi_variables():
    for vectors in (1, 2, 4):
        low, high = between(2 * vectors)
        assert stats.chi2.cdf(low**2, 2 * vectors) == pytest.approx(FALSE_ALARM, rel=1e-2)
        assert stats.chi2.sf(high**2, 2 * vectors) == pytest.approx(FALSE_ALARM, rel=1e-2)


@pytest.mark.parametrize("rows", [1, 64])
def test_false_norms_are_found_beyond_a_factor(rows):
    """Of one row (rank one) the upper bound is exact."""
    job = Job(48, 64)
    job.accumulate(*job.batch(rows))
    norm = float(job.gradient.norm())
    low, high = job.sketch.bounds()
    assert low < norm < high
    assert job.sketch.plausible(norm)
    assert not job.sketch.plausible(norm / 100)
    assert not job.sketch.plausible(norm * (1.01 if rows == 1 else 50))
    assert not any(job.sketch.plausible(value) for value in (nan, inf, -1.0, 0.0))


# --- what a weight check is without drift -------------------------------------------------------------------------


def test_without_updates_checks_are_those_of_any_weight():
    job, key = Job(48, 64), KEYS.fresh(0, "w")
    sketched, plain = Sketch(job.w, key).check, WeightCheck(Linear(), job.w, key)
    x, g = job.batch()
    y, dx = x @ job.w.t(), g @ job.w
    for lie in (0.0, 1e-3):
        found = []
        for check in (sketched, plain):
            source = check.forward(x, KEYS.fresh(0, "x"), keep=False)
            output = source.output(y + lie)
            found.append((output, source.backward(g, want_dx=True, want_dw=False).input_gradient(dx + lie)))
        assert found[0] == found[1]

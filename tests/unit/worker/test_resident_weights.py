"""Weights that live on the worker: gradients stay, optimizers run there, and everything is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torch import Tensor, nn

from tempo.engine.link import ACKNOWLEDGED, Link
from tempo.errors import WorkerFailedError, WorkerOutOfMemoryError
from tempo.wire.messages import (
    Adam,
    Backward,
    Conv,
    Fetch,
    Forward,
    Linear,
    Lion,
    Muon,
    Product,
    Request,
    Rule,
    Sgd,
    Store,
    Update,
)
from tempo.worker.budget import Budget
from tempo.worker.compute import Incoming, TorchCompute
from tempo.worker.refusal import Refusal
from tempo.worker.store import PARTS, Numbers
from tempo.worker.update import apply, states

from .conftest import InProcess

Start = Callable[..., InProcess]
WHERE: dict[str, Any] = {"step": 0, "layer": 3, "weight": 1}
SGD = Sgd(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.01, nesterov=False, maximize=False)
ADAM = Adam(
    lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01, decoupled=True, amsgrad=True, maximize=False, steps=0
)
LION = Lion(lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.01)
MUON = Muon(
    lr=0.1, adjusted_lr=0.2, weight_decay=0.1, momentum=0.95, nesterov=True,
    coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, iterations=5,
)  # fmt: skip
RULES: list[Rule] = [SGD, replace(SGD, momentum=0.0, dampening=0.0), ADAM, LION, MUON]
T, D, M = 7, 5, 4


def do(link: Link, message: Request, tensors: dict[str, Tensor] | None = None) -> None:
    """A request that wants nothing."""
    link.request(message, tensors or {}, {})[ACKNOWLEDGED].result()


def store(link: Link, **parts: Tensor) -> None:
    do(link, Store(**WHERE), parts)


def fetch(link: Link, *names: str, like: Tensor) -> list[Tensor]:
    norm = (1,), torch.float64
    wants = {name: norm if name == "norm" else (tuple(like.shape), like.dtype) for name in names}
    futures = link.request(Fetch(**WHERE), {}, wants)
    return [futures[name].result().clone() for name in names]


def accumulate(link: Link, x: Tensor, g: Tensor, *, dx: bool = False, product: Product | None = None) -> Tensor | None:
    """A forward and a backward pass, the gradient of which stays."""
    product = product or Linear()
    link.request(Forward(**WHERE, operand=5, product=product), {"x": x}, {"y": (tuple(g.shape), g.dtype)})["y"].result()
    message = Backward(**WHERE, operand=5, product=product, accumulate=True)
    if not dx:
        do(link, message, {"g": g})
        return None
    return link.request(message, {"g": g}, {"dx": (tuple(x.shape), x.dtype)})["dx"].result()


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("transport", ["shm", "tcp", "tls"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_training_on_the_worker_is_training_here(start: Start, transport: str, rule: Rule) -> None:
    """Several steps of two micro-batches each, with momentum and clipping, without a gradient ever travelling."""
    link = start(tls=transport == "tls").link(transport)
    w, state = random(M, D), {}
    store(link, w=w)
    received = link.bytes_received
    for step in range(4):
        expected = torch.zeros_like(w)
        for batch in range(2):
            x, g = random(T, D, seed=10 * step + batch), random(T, M, seed=10 * step + batch + 5)
            dx = accumulate(link, x, g, dx=batch == 1)
            if dx is not None:
                torch.testing.assert_close(dx, g @ w)
            expected += g.t() @ x
        received = link.bytes_received
        (norm,) = fetch(link, "norm", like=w)
        torch.testing.assert_close(norm, expected.norm()[None])
        assert link.bytes_received == received + 8
        now = replace(rule, steps=step) if isinstance(rule, Adam) else rule
        do(link, Update(**WHERE, rule=now, scale=0.3))
        apply(now, w, 0.3 * expected, state)
    found = fetch(link, "w", *state, like=w)
    assert set(state) == set(states(rule))
    for ours, theirs in zip(found, [w, *state.values()]):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    y = link.request(Forward(**WHERE, operand=0, product=Linear()), {"x": x}, {"y": ((T, M), w.dtype)})["y"].result()
    torch.testing.assert_close(y, x @ w.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_gradient_is_kept_in_the_weight_s_dtype(start: Start, dtype: torch.dtype) -> None:
    link = start().link()
    w, x, g = random(M, D, dtype=dtype), random(T, D, dtype=torch.float32), random(T, M, dtype=torch.float32)
    store(link, w=w)
    for _ in range(2):
        accumulate(link, x, g)
    (found,) = fetch(link, "gradient", like=w)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found, (2 * g.t() @ x).to(dtype), rtol=tolerance, atol=tolerance)


def test_gradients_of_convolutions_stay_too(start: Start) -> None:
    link = start().link()
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    x = torch.randn(2, 4, 9, 9)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    store(link, w=layer.weight.detach())
    accumulate(link, x, g, product=Conv((2, 2), (1, 1), (1, 1), 2))
    (found,) = fetch(link, "gradient", like=layer.weight)
    torch.testing.assert_close(found, layer.weight.grad)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_what_was_fetched_and_is_stored_elsewhere_goes_on_there(start: Start, rule: Rule, transport: str) -> None:
    """With all states, and a gradient half accumulated."""
    worker = start()
    links = [worker.link("shm"), start().link(transport)]

    def train(*, move: bool) -> list[Tensor]:
        link, w = links[0], random(M, D)
        store(link, w=w)
        for step in range(4):
            x, g = random(T, D, seed=step), random(T, M, seed=step + 100)
            accumulate(link, x, g)
            if move and step == 2:
                names = ["w", "gradient", *states(rule)]
                parts = dict(zip(names, fetch(link, *names, like=w)))
                link = links[1]
                store(link, **parts)
            accumulate(link, x, g)
            do(link, Update(**WHERE, rule=replace(rule, steps=step) if isinstance(rule, Adam) else rule))
        return fetch(link, "w", *states(rule), like=w)

    for stayed, moved in zip(train(move=False), train(move=True)):
        assert torch.equal(stayed, moved)


# --- what is refused, and that it changes nothing ---


def everything(link: Link) -> list[Tensor]:
    return fetch(link, "w", "gradient", "exp_avg", "exp_avg_sq", "norm", like=random(M, D))


def prepared(link: Link) -> list[Tensor]:
    """A weight with all that belongs to it, and an operand."""
    parts = {name: random(M, D, seed=seed).abs() for seed, name in enumerate(("w", "exp_avg", "exp_avg_sq"))}
    store(link, **parts)
    accumulate(link, random(T, D), random(T, M))
    return everything(link)


G = random(T, M)
BACKWARD = Backward(**WHERE, operand=5, product=Linear(), accumulate=True)
BAD: dict[str, tuple[Request, dict[str, Tensor], dict[str, Any], str]] = {
    "dw with accumulate": (BACKWARD, {"g": G}, {"dw": ((M, D), G.dtype)}, "bad-request"),
    "gradient of another batch": (BACKWARD, {"g": G[1:]}, {}, "bad-request"),
    "gradient of another width": (BACKWARD, {"g": random(T, M + 1)}, {}, "bad-request"),
    "dx of another shape": (BACKWARD, {"g": G}, {"dx": ((T, D + 1), G.dtype)}, "bad-request"),
    "no g": (BACKWARD, {}, {}, "bad-request"),
    "integers": (BACKWARD, {"g": torch.ones(T, M, dtype=torch.int64)}, {}, "bad-request"),
    "a convolution": (replace(BACKWARD, product=Conv((1,), (0,), (1,), 1)), {"g": G}, {}, "bad-request"),
    "gradient of an unknown weight": (replace(BACKWARD, weight=2), {"g": G}, {}, "unknown-number"),
    "gradient of an unknown operand": (replace(BACKWARD, operand=6), {"g": G}, {}, "unknown-number"),
    "update of an unknown weight": (Update(**WHERE | {"weight": 2}, rule=ADAM), {}, {}, "unknown-number"),
    "update with a tensor": (Update(**WHERE, rule=ADAM), {"g": G}, {}, "bad-request"),
    "update with a want": (Update(**WHERE, rule=ADAM), {}, {"w": ((M, D), G.dtype)}, "bad-request"),
    "rate of infinity": (Update(**WHERE, rule=replace(ADAM, lr=float("inf"))), {}, {}, "bad-request"),
    "decay of nan": (Update(**WHERE, rule=replace(SGD, weight_decay=float("nan"))), {}, {}, "bad-request"),
    "beta of one": (Update(**WHERE, rule=replace(ADAM, beta1=1.0)), {}, {}, "bad-request"),
    "coefficient of nan": (
        Update(**WHERE, rule=replace(MUON, coefficients=(1.0, 1.0, float("nan")))), {}, {}, "bad-request",
    ),
    "scale of nan": (Update(**WHERE, rule=ADAM, scale=float("nan")), {}, {}, "bad-request"),
    "fetch of an unknown weight": (Fetch(**WHERE | {"weight": 2}), {}, {"w": ((M, D), G.dtype)}, "unknown-number"),
    "fetch of what is not kept": (Fetch(**WHERE), {}, {"momentum_buffer": ((M, D), G.dtype)}, "unknown-number"),
    "fetch of what there never is": (Fetch(**WHERE), {}, {"key": ((M, D), G.dtype)}, "bad-request"),
    "fetch of another shape": (Fetch(**WHERE), {}, {"w": ((D, M), G.dtype)}, "bad-request"),
    "fetch of another dtype": (Fetch(**WHERE), {}, {"exp_avg": ((M, D), torch.float32)}, "bad-request"),
    "norm of another shape": (Fetch(**WHERE), {}, {"norm": ((), torch.float64)}, "bad-request"),
    "norm of another dtype": (Fetch(**WHERE), {}, {"norm": ((1,), torch.float32)}, "bad-request"),
    "fetch with a tensor": (Fetch(**WHERE), {"w": G}, {}, "bad-request"),
    "state of another shape": (Store(**WHERE), {"w": random(M, D), "exp_avg": random(D, M)}, {}, "bad-request"),
    "state of another dtype": (
        Store(**WHERE), {"w": random(M, D), "gradient": random(M, D).float()}, {}, "bad-request",
    ),
    "state of another name": (Store(**WHERE), {"w": random(M, D), "step": random(M, D)}, {}, "bad-request"),
    "state without a weight": (Store(**WHERE), {"exp_avg": random(M, D)}, {}, "bad-request"),
}  # fmt: skip


@pytest.mark.parametrize(("message", "tensors", "wants", "code"), BAD.values(), ids=BAD.keys())
def test_a_request_that_makes_no_sense_changes_nothing(
    start: Start, message: Request, tensors: dict[str, Tensor], wants: dict[str, Any], code: str
) -> None:
    link = start().link()
    before = prepared(link)
    for future in link.request(message, tensors, wants).values():
        with pytest.raises(WorkerFailedError, match=f"layer 3: {code}"):
            future.result()
    for was, now in zip(before, everything(link)):
        assert torch.equal(was, now)


def test_muon_is_refused_on_anything_but_a_matrix(start: Start) -> None:
    link = start().link()
    w = random(3, 2, 2)
    store(link, w=w, gradient=w)
    with pytest.raises(WorkerFailedError, match="bad-request: Muon is for matrices, the weight has 3 axes"):
        do(link, Update(**WHERE, rule=MUON))
    for kept in fetch(link, "w", "gradient", like=w):
        assert torch.equal(kept, w)


def test_an_update_takes_the_gradient_with_it(start: Start) -> None:
    link = start().link()
    prepared(link)
    do(link, Update(**WHERE, rule=ADAM))
    with pytest.raises(WorkerFailedError, match="unknown-number: gradient of weight 1 is not stored"):
        do(link, Update(**WHERE, rule=ADAM))


def test_forgetting_a_gradient_leaves_the_weight(start: Start) -> None:
    link = start().link()
    w, _, first, second, _ = prepared(link)
    link.forget(gradients=[1, 2])
    with pytest.raises(WorkerFailedError, match="unknown-number"):
        fetch(link, "gradient", like=w)
    for was, now in zip((w, first, second), fetch(link, "w", "exp_avg", "exp_avg_sq", like=w)):
        assert torch.equal(was, now)
    x = random(T, D, seed=9)
    accumulate(link, x, G)  # starts from nothing
    torch.testing.assert_close(fetch(link, "gradient", like=w)[0], G.t() @ x)


@pytest.mark.parametrize("again", [True, False], ids=["replaced", "forgotten"])
def test_all_that_belongs_to_a_weight_goes_with_it(start: Start, again: bool) -> None:
    link = start().link()
    w, *_ = prepared(link)
    if again:
        store(link, w=w)
    else:
        link.forget(weights=[1])
    for name in "gradient", "norm", "exp_avg", "exp_avg_sq":
        with pytest.raises(WorkerFailedError, match="unknown-number"):
            fetch(link, name, like=w)


def test_a_change_that_failed_half_way_drops_the_weight(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(rule: Rule, w: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        w.mul_(0.5)
        raise torch.OutOfMemoryError("full")

    link = start().link()
    prepared(link)
    with monkeypatch.context() as patched:
        patched.setattr("tempo.worker.compute.apply", half)
        with pytest.raises(WorkerOutOfMemoryError):
            do(link, Update(**WHERE, rule=ADAM))
    with pytest.raises(WorkerFailedError, match="unknown-number: weight 1 is not stored"):
        fetch(link, "w", like=random(M, D))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_the_null_worker_takes_part(start: Start, transport: str) -> None:
    link = start(null=True).link(transport)
    w = random(M, D)
    store(link, w=w, exp_avg=w)
    accumulate(link, random(T, D), G, dx=True)
    (norm,) = fetch(link, "norm", like=w)
    assert norm.isfinite()
    assert norm >= 0
    do(link, Update(**WHERE, rule=ADAM))
    for found in fetch(link, "w", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", like=w):
        assert found.isfinite().all()
    with pytest.raises(WorkerFailedError, match="unknown-number"):
        do(link, Update(**WHERE, rule=ADAM))


# --- memory ---


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_gradients_and_states_count_and_a_refusal_costs_nothing(start: Start, transport: str) -> None:
    link = start(memory_limit="1200KiB").link(transport)
    w = random(100, 250)  # a block of 224 KiB, of which five fit
    x, g = random(1, 250), random(1, 100)

    def begin() -> None:
        link.forget(weights=[1], operands=[5])
        store(link, w=w)
        accumulate(link, x, g)

    for _ in range(3):
        begin()
        do(link, Store(**WHERE | {"weight": 2}), {"w": w})
        with pytest.raises(WorkerOutOfMemoryError, match="--memory-limit"):
            do(link, Update(**WHERE, rule=ADAM))  # of its three averages two would fit
        do(link, Update(**WHERE, rule=LION))  # so one does
        link.forget(weights=[2])
        begin()
        do(link, Update(**WHERE, rule=ADAM))
        accumulate(link, x, g)
        do(link, Store(**WHERE | {"weight": 2}), {"w": w[:10]})
        with pytest.raises(WorkerOutOfMemoryError):
            do(link, Store(**WHERE | {"weight": 3}), {"w": w, "gradient": w})
        do(link, Update(**WHERE, rule=replace(ADAM, steps=1)))
        link.forget(weights=[2])


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_gradient_for_which_there_is_no_memory_is_refused(start: Start, transport: str) -> None:
    link = start(memory_limit="1MiB").link(transport)
    w = random(100, 750)  # 600 KB
    store(link, w=w)
    for dx in False, True, False:
        with pytest.raises(WorkerOutOfMemoryError):
            accumulate(link, random(1, 750), random(1, 100), dx=dx)
        with pytest.raises(WorkerFailedError, match="unknown-number"):
            do(link, Update(**WHERE, rule=LION))
    y = link.request(Forward(**WHERE, operand=0, product=Linear()), {"x": w[:1]}, {"y": ((1, 100), w.dtype)})["y"]
    torch.testing.assert_close(y.result(), w[:1] @ w.t())


OPERATIONS = st.one_of(
    st.tuples(st.just("put"), st.integers(1, 2), st.sets(st.sampled_from(PARTS))),
    st.tuples(st.just("accumulate"), st.integers(1, 2), st.none()),
    st.tuples(st.just("update"), st.integers(1, 2), st.sampled_from(RULES)),
    st.tuples(st.just("forget"), st.integers(1, 2), st.none()),
    st.tuples(st.just("forget gradient"), st.integers(1, 2), st.none()),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPERATIONS, max_size=25))
def test_whatever_is_asked_for_all_memory_comes_back(operations: list[tuple[str, int, Any]]) -> None:
    """And what is refused for want of memory changes nothing."""
    w, limit = torch.ones(8, 8), 7 * 256
    budget = Budget(limit)
    account = budget.open()
    numbers = Numbers(TorchCompute(torch.device("cpu")), account)

    def content() -> list[dict[str, Tensor]]:
        return [{name: kept.tensor.clone() for name, kept in parts.items()} for parts in numbers._weights.values()]

    for what, number, argument in operations:
        before = content()
        try:
            if what == "put":
                numbers.put_weight(number, {name: Incoming(w.clone()) for name in {"w", *argument}})
            elif what == "accumulate" and number in numbers._weights:
                numbers.accumulate(number, Linear(), w, w)
            elif what == "update" and "gradient" in numbers._weights.get(number, {}):
                numbers.update(number, argument, 1.0)
            elif what == "forget":
                numbers.forget(weights=[number])
            else:
                numbers.forget(gradients=[number])
        except Refusal:
            if what != "put":  # what is replaced makes room first
                after = content()
                assert [list(parts) for parts in before] == [list(parts) for parts in after]
                assert all(torch.equal(a[name], b[name]) for a, b in zip(before, after) for name in a)
    numbers.forget(weights=[1, 2])
    account.trim()
    budget.reserve(limit)  # or it is refused

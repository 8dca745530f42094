"""Weights that live on workers: an unchanged loop, plain PyTorch's numbers, and nothing stale that can be read."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import Connect
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tempo.engine.away import AwayParameter
from tempo.errors import ProtectionWarning, UpdateError, WeightAwayError
from tempo.optim import Lion, Muon
from tempo.session import Session

BUILD: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "dampened": lambda p: torch.optim.SGD(p, 0.05, momentum=0.8, dampening=0.3, maximize=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
    "lion": lambda p: Lion(p, 1e-4, weight_decay=0.1),
}


class Attention(nn.Module):
    """Three projections of one input, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(32, 48) for _ in range(3))
        self.norm = nn.LayerNorm(48)
        self.twice = nn.Linear(48, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        h = self.norm(F.scaled_dot_product_attention(q, k, v))
        return self.head(F.gelu(self.twice(F.gelu(self.twice(h)))))


def batch(step: int, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 8, 32, generator=generator)
    return x, torch.randint(0, 10, (rows, 8), generator=generator)


def loss_of(model: nn.Module, step: int, rows: int = 8) -> torch.Tensor:
    x, labels = batch(step, rows)
    return F.cross_entropy(model(x).flatten(0, 1), labels.flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip: Callable[..., torch.Tensor] = nn.utils.clip_grad_norm_,
    steps: range = range(9),
) -> list[float]:
    """A loop with a schedule, clipping, accumulation and evaluations."""
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        for part in range(2):
            loss = loss_of(model, 2 * step + part)
            loss.backward()
            losses.append(loss.item())
        losses.append(clip(model.parameters(), 0.5).item())
        optimizer.step()
        scheduler.step()
        if step % 3 == 1:
            with torch.no_grad():
                losses.append(loss_of(model, 1000 + step, 3).item())
    return losses


def on_workers(connect: Connect, scheme: str = "mix", **fields: object) -> Session:
    fields = {"base": "secret", "rekey_rows": 300, **fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return connect(scheme=scheme, update="worker", **fields)


def protect(session: Session, model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return session.protect(model)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("mix", "sgd"),
        ("mix", "nesterov"),
        ("mix", "dampened"),
        ("tempo-signed", "nesterov"),
        ("tempo-signed", "adamw"),
        ("tempo-signed", "lion"),
        ("insecure-plain", "nesterov"),
    ],
)
def test_an_unchanged_loop_gives_the_numbers_of_plain_pytorch(connect: Connect, scheme: str, name: str) -> None:
    plain = Attention()
    expected = train(plain, BUILD[name](plain.parameters()))
    linear = name not in ("adamw", "lion")
    session = on_workers(connect, scheme, verify="always" if linear else "off")
    model = protect(session, Attention())
    optimizer = BUILD[name](model.parameters())
    assert session.optimizer(optimizer) is optimizer
    assert isinstance(optimizer, type(BUILD[name](plain.parameters())))
    found = train(model, optimizer, session.clip_grad_norm_)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    stats = session.stats()
    small = {name for name, p in model.named_parameters() if isinstance(p, AwayParameter)}
    assert {"query.weight", "key.weight", "value.weight", "twice.weight"} <= small
    assert stats.decryptions["dw"] == (0 if scheme != "mix" else stats.decryptions["dw"])
    assert stats.decryptions["w"] > 0, "masks were never renewed"
    tolerance = {"rtol": 1e-4, "atol": 1e-6 if linear else 1e-4}
    for key, value in model.state_dict().items():
        if name == "lion" and value.dim() == 1:
            continue  # the gradient of the keys' bias is zero but for rounding, of which Lion takes the sign
        torch.testing.assert_close(value, plain.state_dict()[key], **tolerance)


def test_gradients_do_not_travel(connect: Connect) -> None:
    session = on_workers(connect, rekey_rows=1 << 20)
    model = protect(session, nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)))
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), 0.1))
    before = None
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(40, 64)).square().mean().backward()
        optimizer.step()
        before = before or session.stats()
    used = session.stats() - before
    assert used.encryptions == {"x": 6, "w": 0, "g": 6}
    assert used.decryptions == {"y": 6, "dx": 3, "dw": 0, "w": 0}
    assert used.bytes_received == 4 * 40 * 64 * (6 + 3)


def test_what_would_read_a_stale_weight_or_an_absent_gradient_raises(connect: Connect) -> None:
    session = on_workers(connect)
    model = protect(session, nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)))
    ordinary = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), 0.1))
    model(torch.randn(40, 64)).square().mean().backward()
    weight = model[0].weight
    assert weight.shape == (64, 64)
    assert weight.requires_grad
    assert sum(p.numel() for p in model.parameters()) == 64 * 67
    assert "on worker" in repr(weight)
    for read in (
        lambda: weight.sum(),
        lambda: weight.detach(),
        lambda: weight.data,
        lambda: weight[0],
        lambda: weight.tolist(),
        lambda: torch.nn.functional.linear(torch.randn(3, 64), weight),
        lambda: copy.deepcopy(model),
    ):
        with pytest.raises(WeightAwayError, match=r"layer '0': its weight is on a worker .*fetch_weights"):
            read()
    for read in (
        lambda: weight.grad,
        lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        ordinary.step,
        ordinary.zero_grad,
        model.zero_grad,
    ):
        with pytest.raises(WeightAwayError, match=r"layer '0': the gradient .*session.optimizer"):
            read()
    with pytest.raises(WeightAwayError), torch.no_grad():
        weight.zero_()
    optimizer.step()
    session.fetch_weights()
    assert type(weight) is nn.Parameter
    assert torch.isfinite(weight).all()


def test_a_graph_from_before_a_step_is_refused_as_by_pytorch(connect: Connect) -> None:
    session = on_workers(connect)
    model = protect(session, nn.Linear(64, 64))
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), 0.1))
    x = torch.randn(40, 64, requires_grad=True)
    y = model(x)
    y.sum().backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_backward_through_one_call_accumulates_as_pytorch_does(connect: Connect) -> None:
    x = torch.randn(40, 64)
    torch.manual_seed(1)
    plain = nn.Linear(64, 64)
    session = on_workers(connect)
    model = protect(session, copy.deepcopy(plain))
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), 0.1))
    for layer in (plain, model):
        y = layer(x).square().mean()
        y.backward(retain_graph=True)
        y.backward()
    session.fetch_weights()
    torch.testing.assert_close(model.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-6)
    optimizer.step()  # with a gradient that is here
    torch.testing.assert_close(model.weight, plain.weight - 0.1 * plain.weight.grad, rtol=1e-4, atol=1e-6)


def test_clipping_between_the_parts_of_a_step(connect: Connect) -> None:
    """What comes after is not scaled with what came before."""
    torch.manual_seed(1)
    plain = nn.Linear(64, 64)
    session = on_workers(connect)
    model = protect(session, copy.deepcopy(plain))
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), 0.1))
    norms = []
    for layer, clip in ((plain, nn.utils.clip_grad_norm_), (model, session.clip_grad_norm_)):
        for part in range(3):
            generator = torch.Generator().manual_seed(part)
            (10 * layer(torch.randn(40, 64, generator=generator))).square().mean().backward()
            norms.append(float(clip(layer.parameters(), 0.5)))
    assert norms[3:] == pytest.approx(norms[:3], rel=1e-4)
    optimizer.step()
    session.fetch_weights()
    torch.testing.assert_close(model.weight, plain.weight - 0.1 * plain.weight.grad, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing(connect: Connect) -> None:
    class Checkpointed(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    plain = Checkpointed()
    expected = train(plain, BUILD["nesterov"](plain.parameters()), steps=range(4))
    session = on_workers(connect)
    model = protect(session, Checkpointed())
    optimizer = session.optimizer(BUILD["nesterov"](model.parameters()))
    assert train(model, optimizer, session.clip_grad_norm_, range(4)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("scheme", "name"), [("mix", "nesterov"), ("tempo-signed", "adamw")])
def test_states_are_pytorch_s_own_and_training_goes_on_from_them_anywhere(
    connect: Connect, scheme: str, name: str
) -> None:
    plain = Attention()
    ordinary = BUILD[name](plain.parameters())
    train(plain, ordinary, steps=range(4))
    session = on_workers(connect, scheme, verify="always" if name == "nesterov" else "off")
    model = protect(session, Attention())
    optimizer = session.optimizer(BUILD[name](model.parameters()))
    train(model, optimizer, session.clip_grad_norm_, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    reference = ordinary.state_dict()["state"]
    assert saved[1]["state"].keys() == reference.keys()
    for number, state in saved[1]["state"].items():
        assert state.keys() == reference[number].keys()
        for key in state:
            torch.testing.assert_close(state[key], reference[number][key], rtol=1e-3, atol=1e-5)
    expected = train(plain, ordinary, steps=range(4, 6))

    # Back here, in plain PyTorch.
    elsewhere = Attention()
    elsewhere.load_state_dict(saved[0])
    other = BUILD[name](elsewhere.parameters())
    other.load_state_dict(copy.deepcopy(saved[1]))  # which takes tensors over
    assert train(elsewhere, other, steps=range(4, 6)) == pytest.approx(expected, rel=1e-3, abs=1e-5)

    # On workers again, after a detour that is undone.
    train(model, optimizer, session.clip_grad_norm_, range(7, 9))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    found = train(model, optimizer, session.clip_grad_norm_, range(4, 6))
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_rows_without_gradient_keep_a_layer_s_updates_here(connect: Connect) -> None:
    """Covered by random numbers, they would be in the gradient that the worker keeps."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last, self.head = nn.Linear(32, 48), nn.Linear(48, 48), nn.Linear(48, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(
                F.gelu(self.last(F.gelu(self.first(x))) + x.mean())[:, :5].mean(1, keepdim=True).expand(-1, 8, -1)
            )

    plain = Pooled()
    expected = train(plain, BUILD["nesterov"](plain.parameters()))
    session = on_workers(connect)
    model = protect(session, Pooled())
    optimizer = session.optimizer(BUILD["nesterov"](model.parameters()))
    assert train(model, optimizer, session.clip_grad_norm_) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert type(model.last.weight) is nn.Parameter
    assert "updated here" in str(session.summary())


def test_momentum_that_links_masks_is_warned_of(connect: Connect) -> None:
    session = on_workers(connect, "mix")
    model = protect(session, nn.Linear(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.optimizer(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.warns(ProtectionWarning, match="links new masks to old ones"):
        session.optimizer(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))


def test_hooks_on_gradients_are_called(connect: Connect) -> None:
    session = on_workers(connect)
    model = protect(session, nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)))
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), 0.1))
    seen = []
    model[0].weight.register_hook(lambda g: seen.append(g.shape))
    model[1].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    model(torch.randn(40, 64)).square().mean().backward()
    assert seen == [(64, 64)] * 2
    assert isinstance(model[2].weight, AwayParameter)
    with pytest.raises(WeightAwayError):
        model[2].weight.register_hook(lambda g: None)
    optimizer.step()


def test_tied_weights_are_updated_here(connect: Connect) -> None:
    session = on_workers(connect)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    protect(session, model)
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), 0.1))
    model(torch.randn(40, 64)).square().mean().backward()
    optimizer.step()
    assert type(model[0].weight) is nn.Parameter
    assert isinstance(model[1].weight, AwayParameter)


@pytest.mark.parametrize(
    ("scheme", "verify", "build", "said"),
    [
        ("mix", "off", torch.optim.Adam, r"does not commute.*torch.optim.SGD, tempo.optim.Muon"),
        ("tempo", "off", torch.optim.SGD, r"does not commute.*workers can run none.*tempo-signed"),
        ("mix-tuned", "off", torch.optim.SGD, "does not commute"),
        ("tempo-signed", "always", torch.optim.AdamW, r"no check follows AdamW.*checked are torch.optim.SGD;"),
        ("tempo-signed", "off", torch.optim.Muon, r"rounds to bfloat16.*tempo.optim.Muon"),
        ("tempo-signed", "off", torch.optim.Adagrad, r"workers cannot run .*Adagrad: they can torch.optim.SGD"),
    ],
)
def test_what_is_not_exact_or_not_checked_is_an_error_with_the_legal_choices(
    connect: Connect, scheme: str, verify: str, build: type[torch.optim.Optimizer], said: str
) -> None:
    session = on_workers(connect, scheme, verify=verify)
    model = protect(session, nn.Linear(64, 64, bias=False))
    with pytest.raises(UpdateError, match=said):
        session.optimizer(build(model.parameters(), 0.1))


def test_muon(connect: Connect) -> None:
    """Of matrices, beside another optimizer of the rest."""

    def both(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        return Muon(matrices, 0.01), torch.optim.SGD([p for p in model.parameters() if p.dim() < 2], 0.05)

    def run(model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...]) -> list[float]:
        losses = []
        for step in range(5):
            loss = loss_of(model, step)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item())
        return losses

    plain = Attention()
    expected = run(plain, both(plain))
    session = on_workers(connect, verify="off")
    model = protect(session, Attention())
    matrices, rest = both(model)
    assert run(model, (session.optimizer(matrices), rest)) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert isinstance(model.query.weight, AwayParameter)


def test_without_session_optimizer_weights_stay(connect: Connect) -> None:
    plain = Attention()
    session = on_workers(connect)
    model = protect(session, Attention())
    expected = train(plain, BUILD["nesterov"](plain.parameters()))
    assert train(model, BUILD["nesterov"](model.parameters())) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert session.stats().decryptions["dw"] > 0


def test_an_optimizer_goes_on_without_its_session_and_with_another(connect: Connect) -> None:
    plain = Attention()
    ordinary = BUILD["nesterov"](plain.parameters())
    expected = [train(plain, ordinary, steps=range(start, start + 2)) for start in (0, 2, 4)]
    model = Attention()
    optimizer = BUILD["nesterov"](model.parameters())
    found = []
    for start in (0, 2, 4):
        if start == 2:  # in between without any
            found.append(train(model, optimizer, steps=range(start, start + 2)))
            continue
        session = on_workers(connect)
        protect(session, model)
        assert session.optimizer(optimizer) is optimizer
        assert session.optimizer(optimizer) is optimizer
        found.append(train(model, optimizer, session.clip_grad_norm_, range(start, start + 2)))
        assert session.stats().decryptions["w"] > 0
        session.unprotect(model)
        session.close()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_closing_and_unprotecting_bring_weights_back(connect: Connect) -> None:
    for leave in (lambda session, model: session.close(), lambda session, model: session.unprotect(model)):
        plain = Attention()
        train(plain, BUILD["sgd"](plain.parameters()), steps=range(3))
        session = on_workers(connect)
        model = protect(session, Attention())
        train(model, session.optimizer(BUILD["sgd"](model.parameters())), session.clip_grad_norm_, range(3))
        leave(session, model)
        assert all(type(p) is nn.Parameter for p in model.parameters())
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

"""Training loops written for plain PyTorch run a protected model unchanged, and get plain PyTorch's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tempo.session import Session

STEPS = 6
Loop = Callable[[nn.Module, list[tuple[Tensor, Tensor]]], list[float]]


class Network(nn.Module):
    """A convolution, a strided one, a norm and two fully connected layers."""

    def __init__(self) -> None:
        super().__init__()
        # No bias before the norm: its gradient is zero but for rounding, and AdamW would make steps of that.
        narrow = nn.Conv2d(6, 8, 3, stride=2, bias=False)
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GELU(), narrow, nn.BatchNorm2d(8), nn.GELU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.Tanh(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 8, 8), torch.randint(5, (6,))) for _ in range(count)]


def compare(session: Session, loop: Loop, tolerance: float = 1e-4) -> None:
    """Run ``loop`` on a plain and on a protected copy of one model."""
    torch.manual_seed(0)
    plain = Network()
    protected = session.protect(copy.deepcopy(plain))
    before = session.stats()
    expected = loop(plain, batches())
    assert session.stats().flops_offloaded == before.flops_offloaded
    actual = loop(protected, batches())
    used = session.stats() - before
    assert used.flops_offloaded > 0
    assert used.flops_trusted == 0
    assert used.encryptions["g"] > 0
    assert actual == pytest.approx(expected, rel=tolerance, abs=1e-6)
    for (name, weight), reference in zip(protected.named_parameters(), plain.parameters(), strict=True):
        difference = float((weight - reference).detach().norm() / reference.detach().norm())
        assert difference <= 10 * tolerance, name


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)


@pytest.mark.parametrize("scheme", ["tempo", "insecure-plain"])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_hand_written_loop_with_schedule_and_clipping(connect, scheme, optimizer, set_to_none):
    def loop(model, data):
        steps = optimizer(model)
        schedule = torch.optim.lr_scheduler.OneCycleLR(steps, 0.05 if optimizer is sgd else 1e-3, total_steps=STEPS)
        losses = []
        for x, target in data:
            steps.zero_grad(set_to_none=set_to_none)
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            losses.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            steps.step()
            schedule.step()
            losses.append(loss.item())
        return losses

    compare(connect(scheme=scheme), loop)


def test_a_mask_serves_a_weight_until_it_changes(connect):
    """Accumulation: two forward passes per update share the masked weight, every one has its own input masks."""

    def loop(model, data):
        steps, losses = sgd(model), []
        for start in range(0, STEPS, 2):
            steps.zero_grad()
            for x, target in data[start : start + 2]:
                loss = F.cross_entropy(model(x), target) / 2
                loss.backward()
                losses.append(loss.item())
            steps.step()
        return losses

    session = connect(scheme="tempo")
    compare(session, loop)
    assert session.stats().encryptions == {"x": 4 * STEPS, "w": 4 * STEPS // 2, "g": 4 * STEPS}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(connect, dtype):
    def loop(model, data):
        steps, losses = sgd(model), []
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        for x, target in data:
            steps.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                y = model(x)
                loss = F.cross_entropy(y.float(), target)
            assert y.dtype == dtype
            scaler.scale(loss).backward()
            scaler.unscale_(steps)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(steps)
            scaler.update()
            losses.append(loss.item())
        return losses

    # Every product is rounded to 8 or 11 bits, by either side in another order.
    compare(connect(scheme="tempo"), loop, tolerance={torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype])


@pytest.mark.filterwarnings("ignore:layer .* its output gradient holds NaN or infinity")
def test_a_gradient_scaler_skips_the_steps_that_overflow(connect):
    def loop(model, data):
        steps, scaler, scales = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**126), []
        for x, target in data:
            steps.zero_grad()
            before = [p.detach().clone() for p in model.parameters()]
            scaler.scale(F.cross_entropy(model(x), target, reduction="sum") * 64).backward()
            scaler.step(steps)
            scaler.update()
            scales.append(scaler.get_scale())
            if len(scales) == 1:
                assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        return scales

    compare(connect(scheme="insecure-plain"), loop)


def test_an_averaged_copy_is_protected_too(connect):
    def loop(model, data):
        steps, average = sgd(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        losses = []
        for x, target in data:
            steps.zero_grad()
            F.cross_entropy(model(x), target).backward()
            steps.step()
            average.update_parameters(model)
            with torch.no_grad():
                losses.append(F.cross_entropy(average.eval()(x), target).item())
        return losses

    session = connect(scheme="tempo")
    compare(session, loop)
    # Four layers, in the model and in its average.
    assert session.stats().encryptions == {"x": 8 * STEPS, "w": 8 * STEPS, "g": 4 * STEPS}


def test_training_goes_on_after_evaluation_between_steps(connect):
    def loop(model, data):
        steps, losses = adamw(model), []
        for x, target in data:
            model.train()
            steps.zero_grad()
            F.cross_entropy(model(x), target).backward()
            steps.step()
            model.eval()
            with torch.inference_mode():
                losses.append(F.cross_entropy(model(x), target).item())
        return losses

    compare(connect(2, scheme="tempo"), loop)

"""Feature maps lie channels last where the model cannot notice, with the numbers of plain PyTorch in either order."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tempo import kernels
from tempo.layers.memory_format import unaware
from tempo.wire.layout import is_last
from tempo.wire.messages import Conv


def network() -> nn.Sequential:
    """Spatial, grouped, depthwise, pointwise and strided convolutions, with what lies between them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.Softplus(),  # smooth: at a kink rounding would decide gradients
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 32, 1),
        nn.Softplus(),  # smooth: at a kink rounding would decide gradients
        nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=2, bias=False),
        nn.Conv2d(32, 16, 1, stride=2),
        nn.Conv2d(16, 16, (3, 1), dilation=(2, 1), padding=(2, 0)),
    )


def outcome(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("given", ["contiguous", "channels_last"])
@pytest.mark.parametrize("memory_format", ["auto", "preserve"])
@pytest.mark.parametrize("scheme", ["tempo", "mix"])
@pytest.mark.parametrize("kernel", kernels.available())
def test_numbers_and_strides_are_those_of_plain_pytorch(connect, kernel, scheme, memory_format, given):
    small = {"mix_block": 8, "mix_row_block": 8, "insecure_small_blocks": True} if scheme == "mix" else {}
    session = connect(scheme=scheme, memory_format=memory_format, base="secret", **small)
    plain, x = network(), torch.randn(24, 3, 12, 12)
    if given == "channels_last":
        plain, x = plain.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    model = session.protect(copy.deepcopy(plain))
    with kernels.using(kernel):
        ours, theirs = outcome(model, x), outcome(plain, x)
    for actual, expected in zip(ours, theirs, strict=True):
        # What BatchNorm makes of a bias before it is zero, but for rounding.
        assert float((actual - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))
    assert session.stats().flops_offloaded > 0
    if memory_format == "preserve":
        assert ours[0].stride() == theirs[0].stride()
    else:
        assert ours[0].is_contiguous()
    sent = [kind.channels_last for m in model for kind in getattr(m, "_tempo", m).__dict__.get("_products", ())
            if isinstance(kind, Conv)]  # fmt: skip
    assert sent
    assert set(sent) == {memory_format == "auto" or given == "channels_last"}


def flattened(x: torch.Tensor) -> torch.Tensor:
    return x.view(len(x), -1)


class Viewing(nn.Module):
    """What old tutorials do, behind a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 6 * 6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.classify(x))

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        return flattened(self.conv(x).relu())


class Telling(nn.Module):
    """Notes how the maps inside lie."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = network(), []

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.layers(x)
        self.last.append(is_last(maps))
        return {"maps": maps, "sums": maps.sum((2, 3))}


def test_a_model_that_asks_for_views_keeps_its_order_and_runs(connect):
    assert not unaware(Viewing())
    model = connect().protect(Viewing())
    assert model(torch.randn(4, 3, 8, 8)).shape == (4, 2)


def test_maps_lie_channels_last_inside_and_as_ever_outside(connect):
    model, x = Telling(), torch.randn(16, 3, 12, 12)
    session = connect()
    session.protect(model)
    outputs = model(x)
    assert model.last == [True]
    assert outputs["maps"].is_contiguous()
    assert all(p.is_contiguous() for p in model.parameters())
    session.unprotect(model)
    model(x)
    assert model.last == [True, False]
    assert not model._forward_hooks


def test_what_has_no_maps_is_left_alone(connect):
    assert not unaware(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(4, 4)))
    model = connect().protect(nn.Sequential(nn.Linear(4, 4)))
    assert not model._forward_hooks


def test_a_protected_model_of_maps_can_be_stored(connect):
    model = connect().protect(network())
    again = pickle.loads(pickle.dumps(model))  # noqa: S301
    assert [type(m) for m in again] == [type(m) for m in network()]
    again(torch.randn(2, 3, 12, 12))

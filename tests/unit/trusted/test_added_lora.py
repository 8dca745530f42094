"""LoRA added to the base's output in its own memory: numbers, and what others see, are PEFT's."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from tempo import kernels


@pytest.fixture(params=kernels.available())
def isa(request):
    with kernels.using(request.param):
        yield request.param


class Model(nn.Module):
    """Two layers with one input, as gate and up have."""

    def __init__(self, conv: bool = False) -> None:
        super().__init__()
        self.left, self.right = (Conv1D(24, 16), Conv1D(24, 16)) if conv else (nn.Linear(16, 24), nn.Linear(16, 24))

    def forward(self, x):
        x = x.tanh()
        return self.left(x) * self.right(x)


def adapted(conv=False):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["left", "right"], init_lora_weights=False, fan_in_fan_out=conv)
    model = inject_adapter_in_model(config, Model(conv))
    return model, copy.deepcopy(model)


def kinds(y):
    """What made ``y``, and all that it is made of."""
    nodes, found = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        found.add(type(node).__name__)
        nodes += [following for following, _ in node.next_functions if following is not None]
    return found


@pytest.mark.parametrize("conv", [False, True])
def test_numbers_and_gradients_are_those_of_peft(isa, connect, conv):
    plain, model = adapted(conv)
    session = connect()
    session.protect(model)
    for _ in range(3):  # from the second time on, both are computed at once
        x = torch.randn(2, 40, 16)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        y, expected = model(leaves[0]), plain(leaves[1])
        assert "_OffloadBackward" in kinds(y)
        assert not {"AddmmBackward0", "_AddedBackward"} & kinds(y)  # nothing by itself
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        for out in (y, expected):
            out.square().sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-2)
    assert session.stats().flops_offloaded > 0


def test_hooks_of_the_base_see_the_base_alone(isa, connect):
    plain, model = adapted()
    connect().protect(model)
    seen = []
    model.left.base_layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        torch.testing.assert_close(model(torch.ones(9, 16)), plain(torch.ones(9, 16)), rtol=1e-4, atol=1e-5)
        ((x, output),) = seen
        torch.testing.assert_close(output, plain.left.base_layer(x), rtol=1e-4, atol=1e-5)


def test_a_frozen_adapter_gets_no_gradient(isa, connect):
    plain, model = adapted()
    connect().protect(model)
    for one in (plain, model):
        one.left.lora_B["default"].weight.requires_grad_(False)
        one(torch.ones(9, 16)).square().sum().backward()
    assert model.left.lora_B["default"].weight.grad is None
    torch.testing.assert_close(
        model.left.lora_A["default"].weight.grad, plain.left.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-3
    )

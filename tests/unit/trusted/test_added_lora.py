"""LoRA added to the base's output as it is decoded, or in its own memory: numbers, and what others see, are PEFT's."""

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


def test_where_the_base_stays_it_is_added_in_its_memory(isa, connect):
    plain, model = adapted()
    connect().protect(model, trusted="*")
    leaves = [torch.ones(9, 16).requires_grad_() for _ in range(2)]
    y, expected = model(leaves[0]), plain(leaves[1])
    assert ("_AddedBackward" in kinds(y)) == (isa != kernels.TORCH)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for out in (y, expected):
        out.sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5)


SPLIT = {"scheme": "split", "base": "public", "count": 2, "operators": 2, "split_weight_bits": 16}


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_adapters_of_a_base_in_bfloat16(isa, connect, adapters):
    plain, _ = adapted()
    for name, parameter in plain.named_parameters():
        parameter.data = parameter.data.to(adapters if "lora" in name else torch.bfloat16)
    model = copy.deepcopy(plain)
    session = connect(**SPLIT)
    session.protect(model)
    exact = copy.deepcopy(plain).double()
    for _ in range(2):
        x = torch.randn(40, 16, dtype=torch.bfloat16)
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for dtype in (x.dtype, x.dtype, torch.float64)]
        found = [one(leaf) for one, leaf in zip((model, plain, exact), leaves, strict=True)]
        for y in found:
            y.sum().backward()
        assert found[0].dtype == torch.bfloat16
        for ours, theirs, true in (found, [leaf.grad for leaf in leaves]):
            assert (ours - true).norm() <= 1.1 * (theirs - true).norm() + 1e-3 * true.norm()
    for ours, true in zip(model.parameters(), exact.parameters(), strict=True):
        if ours.requires_grad:
            assert ours.grad.dtype == ours.dtype
            assert (ours.grad - true.grad).norm() <= 0.02 * true.grad.norm()
    assert session.stats().flops_offloaded > 0


@pytest.mark.parametrize("name", ["left", "right"])
def test_a_layer_without_an_adapter_and_one_whose_output_goes_unused(isa, connect, name):
    config = LoraConfig(r=3, target_modules=[name], init_lora_weights=False)
    plain = inject_adapter_in_model(config, Model())
    plain.forward = lambda x: (plain.left(x), plain.right(x))
    model = inject_adapter_in_model(config, Model())
    model.load_state_dict(plain.state_dict())
    connect(**SPLIT).protect(model)
    for used in (0, 1, 1, 0):  # from the second time on, both are computed at once
        x = torch.randn(40, 16)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        ours, theirs = (model.left(leaves[0]), model.right(leaves[0]))[used], plain(leaves[1])[used]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3)
        for one, out in ((model, ours), (plain, theirs)):
            one.zero_grad()
            out.sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-3, atol=2e-3)
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (other.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=2e-3)


def test_a_factor_that_changed_since_raises_as_in_pytorch(connect):
    _, model = adapted()
    connect(**SPLIT).protect(model)
    y = model(torch.ones(9, 16))
    with torch.no_grad():
        model.left.lora_A["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_products_of_adapters_are_counted(connect):
    _, model = adapted()
    session = connect(**SPLIT)
    session.protect(model)
    with session.trusted_products(model) as found:
        model(torch.ones(9, 16)).sum().backward()
    of_a, of_b = 2 * 9 * 4 * 16, 2 * 9 * 4 * 24
    # Two layers: forward, and back to both factors, and through B.
    assert found.total == 2 * (of_a + of_b + of_a + of_b + of_b)

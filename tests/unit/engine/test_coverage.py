"""The audit of placement against PyTorch's own counter: nothing multiplied here goes unseen, and nothing twice."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


def vit(attention: str) -> nn.Module:
    torch.manual_seed(0)
    config = hf.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    )
    return hf.ViTForImageClassification(config)


IMAGES = torch.linspace(-1, 1, 2 * 3 * 64).sin().view(2, 3, 8, 8)
TOKENS = 5
ATTENTION = 2 * 2 * (2 * 2 * TOKENS * TOKENS * 12)
"""Two products of scores and values, in two blocks, for two images, forward."""


def train(model: nn.Module) -> None:
    model(IMAGES).logits.square().sum().backward()


def plain_flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        train(model)
    return counter.get_total_flops()


def test_only_attention_products_of_a_vit_stay_trusted_and_the_two_places_add_up(connect):
    plain = vit("eager")
    session = connect()
    model = session.protect(copy.deepcopy(plain))
    before = session.stats()
    with session.trusted_products(model) as found:
        train(model)
    used = session.stats() - before
    assert used.flops_trusted == 0
    assert found.total + used.flops_offloaded == plain_flops(plain)
    assert found.total == 3 * ATTENTION
    assert {operation for _, operation in found.flops} == {"bmm"}
    assert all(module.endswith("attention") for module, _ in found.flops), found.flops
    # Forward and backward of one block are attributed to that block.
    assert sorted(set(found.flops.values())) == [3 * ATTENTION // 2]
    assert f"{found.total / 1e6:,.3f}" in str(found)


def test_products_that_masks_consist_of_are_none_of_the_models(connect):
    session = connect(scheme="mix")
    model = session.protect(nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 40)))
    with session.trusted_products(model) as found:
        model(torch.randn(70, 40)).square().sum().backward()
    assert session.stats().flops_offloaded > 0
    assert found.total == 0, found.flops


def test_fused_attention_is_counted_too(connect):
    session = connect()
    model = session.protect(vit("sdpa"))
    with session.trusted_products(model) as found, torch.no_grad():
        model(IMAGES)
    assert found.total == ATTENTION


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_layers_that_stay_trusted_are_listed_with_their_flops(connect, mode):
    session = connect()
    model = nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
    session.protect(model, trusted=["1"])
    with session.trusted_products(model) as found, mode():
        model(torch.ones(5, 6))
    assert found.flops == {("1.0", "addmm"): 2 * 5 * 4 * 3}


def test_what_modules_multiply_by_themselves_is_listed_under_their_names(connect):
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))
            self.out = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x @ self.weight)

    session = connect()
    model = session.protect(nn.Sequential(Mixer()))
    with session.trusted_products(model) as found:
        model(torch.ones(5, 4)).sum().backward()
    # The input needs no gradient: the product and that of its weight.
    assert found.flops == {("0", "mm"): 2 * 2 * 5 * 4 * 4}
    assert session.summary().unsupported == ["0 (Mixer)"]


def test_the_audit_leaves_nothing_behind(connect):
    session = connect()
    model = session.protect(nn.Sequential(nn.Linear(4, 4)))
    x = torch.ones(3, 4)
    with session.trusted_products(model), torch.inference_mode():
        model(x)
    with session.trusted_products(model) as second:
        model(x).sum().backward()
    assert second.total == 0
    x.requires_grad_()
    torch.autograd.grad(model(x).sum(), x)  # hooks left behind would refuse this


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_products_count_for_the_module_that_recomputes_them(connect, reentrant):
    session = connect()
    model = session.protect(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()), trusted=["0", "2"])
    x = torch.ones(3, 4, requires_grad=True)
    with session.trusted_products(model) as found:
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    product = 2 * 3 * 4 * 4
    # Forward, again forward, and two products backward.
    assert found.flops == {(name, operation): 2 * product for name in ("0", "2") for operation in ("addmm", "mm")}

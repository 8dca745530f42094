"""Protected models run their trusted layers in native kernels, and are otherwise the models they were."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tempo import kernels
from tempo.trusted.mode import TrustedMode


@pytest.fixture(params=kernels.available())
def isa(request):
    with kernels.using(request.param):
        yield request.param


class Block(nn.Module):
    """Attention and GELU as functions, called in code that nobody wrote for Tempo; notes what computed them."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.Linear(32, 96)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.computed_by: list[str] = []

    def forward(self, x):
        q, k, v = self.projections(x).unflatten(-1, (3, 2, 16)).transpose(1, 3).unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        active = F.gelu(self.up(mixed.transpose(1, 2).flatten(2)))
        self.computed_by = [type(t.grad_fn).__name__ for t in (mixed, active)]
        return self.down(active)


NATIVE = ["_AttentionBackward", "_ActivationBackward"]


def expected_of(model, x):
    plain = copy.deepcopy(model)
    y = plain(x)
    y.square().sum().backward()
    assert plain.computed_by != NATIVE
    return y, {name: p.grad for name, p in plain.named_parameters()}


def test_a_protected_model_computes_the_same_by_native_kernels(isa, connect):
    torch.manual_seed(0)
    model, x = Block(), torch.randn(3, 20, 32)
    y, gradients = expected_of(model, x)
    session = connect()
    session.protect(model)
    ours = model(x)
    assert (model.computed_by == NATIVE) == (isa != kernels.TORCH)
    ours.square().sum().backward()
    torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-3)
    assert session.stats().flops_offloaded > 0


def test_the_encoder_layer_of_pytorch_runs_natively(isa, connect):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, activation="gelu", batch_first=True)
    x = torch.randn(3, 20, 32)
    expected = model(x)
    session = connect()
    session.protect(model)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    ours = model(x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    nodes = [ours.grad_fn]
    while nodes:
        node = nodes.pop()
        seen.append(type(node).__name__)
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert (set(NATIVE) <= set(seen)) == (isa != kernels.TORCH)


def test_taking_back_restores_the_class_and_pytorchs_functions(connect):
    model = Block()
    session = connect()
    session.protect(model)
    assert type(model) is not Block
    assert isinstance(model, Block)
    assert (type(model).__name__, type(model).__qualname__, type(model).__module__) == ("Block", "Block", __name__)
    session.unprotect(model)
    assert type(model) is Block
    model(torch.randn(2, 4, 32))
    assert model.computed_by != NATIVE


def test_copies_and_stored_models_are_of_the_models_own_class(connect):
    model = Block()
    session = connect()
    session.protect(model)
    assert type(copy.deepcopy(model)) is Block
    stored = io.BytesIO()
    torch.save(model, stored)
    assert b"tempo" not in stored.getvalue()
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    assert type(loaded) is Block
    assert torch.equal(loaded.up.weight, model.up.weight)


class Careful(nn.Sequential):
    """Has a way of its own to be copied."""

    def __reduce_ex__(self, protocol):
        return Careful, tuple(copy.deepcopy(module) for module in self)


def test_a_model_with_a_way_of_its_own_to_be_copied_keeps_it(connect):
    model = Careful(nn.Linear(4, 4))
    session = connect()
    session.protect(model)
    assert type(copy.deepcopy(model)) is Careful


def test_a_model_that_fails_leaves_the_mode(connect):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 3))
    session = connect()
    session.protect(model)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(2, 4))
    assert not torch._C._is_torch_function_mode_enabled()


def test_one_protected_model_within_another_enters_the_mode_once(connect):
    inner = Block()
    outer = nn.Sequential(nn.Linear(32, 32), inner)
    session = connect()
    session.protect(inner)
    depths = []
    inner.register_forward_hook(lambda *_: depths.append(torch._C._len_torch_function_stack()))
    with TrustedMode():
        outer(torch.randn(2, 4, 32))
    inner(torch.randn(2, 4, 32))
    assert depths == [1, int(kernels.native() is not None)]


def test_attention_that_stays_here_is_still_counted(isa, connect):
    model = Block()
    session = connect()
    session.protect(model)
    with session.trusted_products(model) as found:
        model(torch.randn(3, 20, 32)).sum().backward()
    forward = 4 * 3 * 2 * 20 * 20 * 16
    assert found.total == forward * 7 // 2

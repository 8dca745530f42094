"""Layers that share their input: sent once where that is safe, and never at the price of plain PyTorch's numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from tempo.engine.autograd import joined


class Branches(nn.Module):
    """Query, key and value of one normalised input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.sigmoid(self.q(x)) * self.k(x).tanh() + self.v(x)


X = torch.linspace(-1, 1, 48).sin().view(6, 8)


@pytest.fixture
def pair(connect):
    torch.manual_seed(0)
    plain = Branches()
    session = connect()
    return session, plain, session.protect(copy.deepcopy(plain))


def step(model: nn.Module, call=None) -> list[Tensor]:
    model.zero_grad()
    (model if call is None else call)(X.clone().requires_grad_()).square().sum().backward()
    return [p.grad for p in model.parameters()]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_from_the_second_call_on_the_input_is_sent_once(pair):
    session, plain, model = pair
    expected, counts = step(plain), []
    for _ in range(3):
        before = session.stats()
        assert_same(step(model), expected)
        counts.append((session.stats() - before).encryptions)
    # The joined weight is masked once, when the three are first sent as one.
    assert counts == [{"x": 3, "w": 3, "g": 3}, {"x": 1, "w": 1, "g": 1}, {"x": 1, "w": 0, "g": 1}]


def test_a_member_whose_output_is_not_used_has_no_gradient(pair):
    """Zeros would be another thing: optimizers decay and move weights with a gradient of zeros."""
    _, _, model = pair
    for _ in range(2):
        step(model)
    model.zero_grad()
    x = model.norm(X)
    used, unused = model.q(x), model.k(x)
    used.sum().backward(retain_graph=True)
    assert model.q.weight.grad is not None
    assert model.k.weight.grad is model.k.bias.grad is model.v.weight.grad is None
    # A gradient asked for and never fetched does not turn up in a later pass.
    torch.autograd.grad(unused.sum(), x, retain_graph=True)
    used.sum().backward()
    assert model.k.weight.grad is None
    torch.testing.assert_close(model.q.weight.grad, 2 * x.detach().sum(0).expand(8, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_repeats_the_calls_of_the_first_pass(pair, reentrant):
    session, plain, model = pair
    expected = step(plain)
    for _ in range(3):
        assert_same(step(model, lambda x: checkpoint(model, x, use_reentrant=reentrant)), expected)
        assert_same(step(model), expected)
    assert session.stats().flops_trusted == 0


def test_a_shared_block_called_twice_under_checkpoints(pair):
    """The group is found between the first call and its recomputation."""
    _, plain, model = pair

    def twice(block: nn.Module) -> list[Tensor]:
        return step(block, lambda x: checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=False))

    assert_same(twice(model), twice(plain))
    assert_same(twice(model), twice(plain))


def test_saved_tensors_may_be_kept_elsewhere(pair):
    _, plain, model = pair
    with save_on_cpu():
        assert_same(step(model), step(plain))
        assert_same(step(model), step(plain))


def test_a_group_stands_aside_in_inference_mode_and_comes_back(pair):
    session, plain, model = pair
    for _ in range(2):
        step(model)
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(model(X), plain(X), rtol=1e-5, atol=1e-5)
    before = session.stats()
    assert_same(step(model), step(plain))
    assert (session.stats() - before).encryptions["x"] == 1


def test_an_input_changed_in_place_is_sent_again(pair):
    _, plain, model = pair

    def run(block: Branches) -> Tensor:
        with torch.no_grad():
            x = block.norm(X)
            q = block.q(x)
            x += 1
            return q + block.k(x) + block.v(x)

    for _ in range(2):
        step(model)
    torch.testing.assert_close(run(model), run(plain), rtol=1e-5, atol=1e-5)


def test_gradients_are_joined_as_they_are():
    whole = torch.randn(5, 12)
    matrix, wide = list(whole.split([3, 4, 5], 1)), torch.randn(5, 24)
    layouts = [matrix, matrix[::-1], matrix[:2] * 2, [matrix[0], matrix[2]], [*matrix, wide[:, 2:7]]]
    layouts += [list(whole.t().split(6)), [wide[:, :4], wide[:, 4::2]], list(whole[:1].expand(5, 12).split(4, 1))]
    for parts in layouts:
        assert torch.equal(joined(parts), torch.cat(parts, 1))
    assert joined(matrix[1:]).data_ptr() == matrix[1].data_ptr()

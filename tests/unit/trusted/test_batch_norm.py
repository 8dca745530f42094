"""BatchNorm by native kernels, alone and with what follows it, against PyTorch in float64; in every instruction set."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import RegNetConfig, RegNetModel, ResNetConfig, ResNetForImageClassification

from tempo import kernels
from tempo.layers.protect import unprotect
from tempo.trusted.batch_norm import norm_relu
from tempo.trusted.mode import TrustedMode
from tempo.trusted.modules import replace_modules

ISAS = kernels.available()


@pytest.fixture(params=ISAS)
def isa(request):
    with kernels.using(request.param):
        yield request.param


def last(*shape):
    """Random maps with channels last in memory."""
    return torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def norm_of(channels, **options):
    kind = nn.BatchNorm2d(channels, **options)
    for p in kind.parameters():
        nn.init.normal_(p)
    return kind


def native(y, isa):
    """Whether what made ``y`` is what should have, so that no test compares PyTorch with itself."""
    return (type(y.grad_fn).__name__ == "_BatchNormBackward") == (isa != kernels.TORCH)


def run(norm, x, residual, follows):
    """What `norm` gives, with ``follows``: ``nothing``, ``relu``, or ``sum`` and ReLU."""
    with TrustedMode():
        return norm(x) if follows == "nothing" else norm_relu(norm, x, residual if follows == "sum" else None)


def exactly(norm, x, residual, follows):
    y = norm(x) + (residual if follows == "sum" else 0)
    return y if follows == "nothing" else y.relu()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("follows", ["nothing", "relu", "sum"])
@given(
    images=st.integers(2, 5),
    channels=st.sampled_from([1, 3, 16, 40, 515]),
    size=st.integers(1, 9),
    mean=st.sampled_from([0.0, 100.0]),
    momentum=st.sampled_from([0.1, None]),
    training=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_values_gradients_and_statistics_are_those_of_pytorch(
    isa, follows, images, channels, size, mean, momentum, training
):
    torch.manual_seed(0)
    norm = norm_of(channels, momentum=momentum).train(training)
    x, residual, g = (last(images, channels, size, size + 2) for _ in range(3))
    operands = [(x + mean).requires_grad_(), residual.requires_grad_()]
    twin, doubles = copy.deepcopy(norm).double(), [t.detach().double().requires_grad_() for t in operands]
    with kernels.using(isa):
        for _ in range(2):  # averages move
            y, exact = run(norm, *operands, follows), exactly(twin, *doubles, follows)
        for (name, ours), theirs in zip(norm.state_dict().items(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5, msg=name)
        assert native(y, isa)
        assert y.movedim(1, -1).is_contiguous()
        # Where ReLU's operand is all but zero, rounding decides what passes.
        operand = twin(doubles[0]).detach() + (residual.detach() if follows == "sum" else 0)
        g = g * (operand.abs() > 1e-3)
        y.backward(g)
    exact.backward(g.double())
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if not mean else {"rtol": 1e-3, "atol": 1e-2}
    for ours, theirs in [(y, exact), *zip(operands, doubles, strict=True)][: 3 if follows == "sum" else 2]:
        ours, theirs = (ours, theirs) if ours is y else (ours.grad, theirs.grad)
        torch.testing.assert_close(ours.double(), theirs, **tolerance)
    for ours, theirs in zip(norm.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=10 * tolerance["atol"])


def test_a_large_one_on_two_threads(isa):
    torch.manual_seed(0)
    norm, x, g, threads = norm_of(64), 5 + last(16, 64, 24, 24), last(16, 64, 24, 24), torch.get_num_threads()
    twin, results = copy.deepcopy(norm).double(), []
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            y = run(norm, leaf, None, "relu")
            y.backward(g)
            results.append((y, leaf.grad))
    finally:
        torch.set_num_threads(threads)
    assert native(y, isa)
    torch.testing.assert_close(y.double(), exactly(twin, x.double(), None, "relu"), rtol=1e-4, atol=1e-4)
    if isa != kernels.TORCH:
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_mean_that_dwarfs_the_spread_leaves_its_digits(isa):
    torch.manual_seed(0)
    norm, x = norm_of(16), 1000 + last(32, 16, 40, 40)
    run(norm, x, None, "nothing")
    # Of a batch, not divided by its size less one.
    expected = 0.9 + 0.1 * x.double().var((0, 2, 3))
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("follows", ["nothing", "relu", "sum"])
def test_what_is_not_finite_is_not_hidden(isa, follows):
    norm, x = norm_of(16).eval(), last(2, 16, 3, 3)
    x[0, 1, 0, 0], x[1, 2, 1, 1], x[1, 3, 1, 1] = float("nan"), float("inf"), -float("inf")
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = run(norm, ours, torch.ones_like(x), follows), exactly(norm, theirs, torch.ones_like(x), follows)
    torch.testing.assert_close(y, expected, equal_nan=True)
    for out in (y, expected):
        out.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    norm.train()
    assert torch.equal(run(norm, x, None, "nothing").isfinite(), norm(x).isfinite())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("follows", ["nothing", "relu", "sum"])
def test_gradients_of_gradients(isa, follows, training):
    torch.manual_seed(0)
    norm = norm_of(16).train(training)
    x, residual = (last(4, 16, 3, 3).requires_grad_() for _ in range(2))
    results = []
    for function in (run, exactly):
        y = function(copy.deepcopy(norm), x, residual, follows)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_only_what_needs_one_gets_a_gradient(isa):
    norm, x = norm_of(16), last(4, 16, 3, 3).requires_grad_()
    norm.requires_grad_(False)
    run(norm, x, last(4, 16, 3, 3), "sum").sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None


@pytest.mark.parametrize("case", ["usual order", "one row", "no weight", "float64", "autocast"])
def test_the_rest_is_left_to_pytorch(case):
    norm, x = norm_of(16), last(4, 16, 3, 3)
    if case == "one row":
        with pytest.raises(ValueError, match="more than 1 value"):
            run(norm, x[:1, :, :1, :1], None, "nothing")
        return
    if case == "no weight":
        norm = nn.BatchNorm2d(16, affine=False)
    elif case == "usual order":
        x = x.contiguous()
    elif case == "float64":
        norm, x = norm.double(), x.double()
    with torch.autocast("cpu", enabled=case == "autocast"):
        assert torch.equal(
            run(copy.deepcopy(norm), x, torch.ones_like(x), "sum"), exactly(norm, x, torch.ones_like(x), "sum")
        )


def resnet(**options):
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2]} | options
    return ResNetForImageClassification(ResNetConfig(num_labels=10, **sizes))


def nodes_of(y):
    """Names of the nodes of the graph behind ``y``."""
    waiting, seen = [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return [type(node).__name__ for node in seen]


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_residual_network_computes_the_same_and_is_what_it_was_when_taken_back(isa, kind):
    model = resnet(layer_type=kind)
    fast, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    replace_modules(fast)
    images = last(4, 3, 32, 32)
    with TrustedMode():
        logits = fast(images).logits
    expected = exact(images.double()).logits
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    found = nodes_of(logits)
    assert found.count("_BatchNormBackward") == (norms if isa != kernels.TORCH else 0)
    assert isa == kernels.TORCH or "ReluBackward0" not in found
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    for out in (logits, expected):
        out.square().sum().backward()
    for (name, ours), theirs in zip(fast.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-2, atol=1e-3, msg=name)
    for (name, mine), theirs in zip(fast.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=1e-5, msg=name)
    unprotect(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in model.modules()]


def test_checkpointing_recomputes_it(isa):
    fast, images = resnet(), last(4, 3, 32, 32).requires_grad_()
    replace_modules(fast)
    gradients = []
    for again in (False, True):
        with TrustedMode():
            y = checkpoint(fast, images, use_reentrant=False) if again else fast(images)
        gradients.append(torch.autograd.grad(y.logits.square().sum(), images)[0])
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-4)


def test_classes_of_other_networks_are_known_by_what_they_compute():
    with torch.device("meta"):
        model = RegNetModel(RegNetConfig(embedding_size=16, hidden_sizes=[16], depths=[1], groups_width=16))
    replace_modules(model)
    mine = {type(m).__mro__[1].__name__ for m in model.modules() if "_tempo_original" in vars(type(m))}
    assert mine == {"ConvNormAct", "Residual"}


@pytest.mark.parametrize("which", ["normalization", "activation", "layer"])
def test_hooks_in_between_are_called(isa, which):
    block = resnet().resnet.encoder.stages[0].layers[0]
    seen = []
    last_norm = block.layer[-1].normalization
    watched = {"normalization": last_norm, "activation": block.activation, "layer": block.layer}[which]
    watched.register_forward_hook(lambda _, __, y: seen.append(y))
    x = last(4, 16, 8, 8)
    expected = block(x)
    replace_modules(block)
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(*seen)


def test_norms_over_processes_are_left_alone():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(resnet()).eval()
    images = last(4, 3, 32, 32)
    expected = model(images).logits
    replace_modules(model)
    with TrustedMode():
        torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-5)

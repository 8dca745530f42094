"""Layers of Llama-like models by native kernels against `transformers`' own, in every instruction set that there is."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as llama

from tempo import kernels
from tempo.layers.protect import unprotect
from tempo.trusted.gated import gated
from tempo.trusted.modules import replace_modules
from tempo.trusted.rotary import rotate_pair

ISAS = kernels.available()


@pytest.fixture(params=ISAS)
def isa(request):
    with kernels.using(request.param):
        yield request.param


def replaced(module):
    twin = copy.deepcopy(module)
    replace_modules(twin)
    return twin


def native(y, node, isa):
    """Whether what made ``y`` is what should have, so that no test compares PyTorch with itself."""
    return (type(y.grad_fn).__name__ == node) == (isa != kernels.TORCH)


def agree(function, exact, operands, node, isa, rtol=1e-5, atol=1e-5):
    """``function`` of ``operands``, and its gradients, are those of ``exact`` in float64, as far as float32 can say."""
    leaves = [t.detach().requires_grad_() for t in operands]
    doubles = [t.detach().double().requires_grad_() for t in operands]
    made, expected = function(*leaves), exact(*doubles)
    made, expected = ((y,) if isinstance(y, torch.Tensor) else y for y in (made, expected))
    assert all(native(y, node, isa) for y in made)
    g = [torch.randn_like(y) for y in made]
    got = torch.autograd.grad(made, leaves, g)
    wanted = torch.autograd.grad(expected, doubles, [t.double() for t in g])
    for ours, theirs in zip((*made, *got), (*expected, *wanted), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)


def norm_of(width, eps=1e-6):
    norm = llama.LlamaRMSNorm(width, eps)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("isa", ISAS)
@given(rows=st.integers(1, 9), width=st.integers(1, 300), scale=st.sampled_from([1e-3, 1.0, 1e4]))
@settings(max_examples=30, deadline=None)
def test_norms_are_those_of_transformers(isa, rows, width, scale):
    torch.manual_seed(0)
    norm = norm_of(width)
    # As written there it computes in float32 whatever it is given.
    exact = lambda x: norm.weight.double() * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))  # noqa: E731
    with kernels.using(isa):
        fast = replaced(norm)
        x = scale * torch.randn(2, rows, width)
        agree(fast, exact, [x], "_RmsNormBackward", isa, atol=1e-4 / scale + 1e-5)


def test_a_large_norm_learns_its_weight(isa):
    torch.manual_seed(0)
    norm = norm_of(2048)
    fast, x, g = replaced(norm), torch.randn(300, 2048), torch.randn(300, 2048)
    y, expected = fast(x), norm(x)
    torch.testing.assert_close(y, expected)
    for out in (y, expected):
        out.backward(g)
    torch.testing.assert_close(fast.weight.grad, norm.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@given(size=st.integers(1, 200), start=st.integers(0, 1))
@settings(max_examples=20, deadline=None)
def test_gated_activations_are_those_of_pytorch(isa, name, size, start):
    torch.manual_seed(0)
    function = nn.SiLU() if name == "silu" else nn.GELU("tanh")
    operands = [3 * torch.randn(size + 1)[start:] for _ in range(2)]
    with kernels.using(isa):
        agree(
            lambda x, up: gated(name, x, up), lambda x, up: function(x) * up, operands, "_GatedBackward", isa, atol=1e-4
        )


def test_a_large_gated_activation_on_two_threads(isa):
    torch.manual_seed(0)
    operands, threads = [torch.randn(600_001) for _ in range(2)], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        agree(
            lambda x, up: gated("silu", x, up),
            lambda x, up: nn.functional.silu(x) * up,
            operands,
            "_GatedBackward",
            isa,
        )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ISAS)
@given(
    heads=st.integers(1, 3),
    tokens=st.integers(1, 20),
    width=st.sampled_from([32, 64, 96, 128]),
    samples=st.sampled_from([1, 2]),
    tokens_first=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_rotations_are_those_of_transformers(isa, heads, tokens, width, samples, tokens_first):
    torch.manual_seed(0)
    q, k = (torch.randn(2, n, tokens, width) for n in (heads, 1))
    if tokens_first:
        q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    cos, sin = torch.randn(2, samples, tokens, width)  # of no angle: each of the halves is used where it belongs
    with kernels.using(isa):
        agree(
            lambda q, k: rotate_pair(q, k, cos, sin),
            lambda q, k: llama.apply_rotary_pos_emb(q, k, cos.double(), sin.double()),
            [q, k],
            "_RotationBackward",
            isa,
        )


@pytest.mark.parametrize("kind", ["norm", "gated", "rotated"])
def test_what_is_not_finite_is_not_hidden(isa, kind):
    x = torch.ones(1, 1, 5, 64)
    x[..., 0, 3], x[..., 1, 3], x[..., 2, 3] = float("nan"), float("inf"), 1e30
    x.requires_grad_()
    functions = {
        "norm": (replaced(norm_of(64)), norm_of(64)),
        "gated": (lambda t: gated("silu", t, t), lambda t: nn.functional.silu(t) * t),
        "rotated": (
            lambda t: rotate_pair(t, t, torch.ones(1, 5, 64), torch.ones(1, 5, 64))[0],
            lambda t: llama.apply_rotary_pos_emb(t, t, torch.ones(1, 5, 64), torch.ones(1, 5, 64))[0],
        ),
    }
    y, expected = (f(x) for f in functions[kind])
    assert torch.equal(y.isfinite(), expected.isfinite())
    (got,), (wanted,) = (torch.autograd.grad(out.sum(), x) for out in (y, expected))
    assert torch.equal(got.isfinite(), wanted.isfinite())


@pytest.mark.parametrize("kind", ["norm", "gated", "rotated"])
def test_gradients_of_gradients(isa, kind):
    torch.manual_seed(0)
    x, norm = torch.randn(1, 2, 5, 64, requires_grad=True), norm_of(64)
    cos, sin = torch.randn(2, 1, 5, 64)
    functions = {
        "norm": (replaced(norm), norm),
        "gated": (lambda t: gated("silu", t, t.sin()), lambda t: nn.functional.silu(t) * t.sin()),
        "rotated": (
            lambda t: rotate_pair(t, t, cos, sin)[0].sin(),
            lambda t: llama.apply_rotary_pos_emb(t, t, cos, sin)[0].sin(),
        ),
    }
    results = []
    for function in functions[kind]:
        (dx,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)


def layer_of(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        attn_implementation="sdpa",
        **options,
    )
    positions = llama.LlamaRotaryEmbedding(config)(torch.empty(0), torch.arange(20)[None])
    return llama.LlamaDecoderLayer(config, 0), positions


def test_a_block_computes_the_same_and_is_what_it_was_when_taken_back(isa):
    layer, positions = layer_of()
    fast, x = replaced(layer), torch.randn(2, 20, 128)
    y, expected = fast(x, position_embeddings=positions), layer(x, position_embeddings=positions)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for out in (y, expected):
        out.square().sum().backward()
    for (name, ours), theirs in zip(fast.named_parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)
    unprotect(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in layer.modules()]


def test_checkpointing_recomputes_it(isa):
    layer, positions = layer_of()
    fast, x = replaced(layer), torch.randn(2, 20, 128, requires_grad=True)
    call = lambda x: fast(x, position_embeddings=positions)  # noqa: E731
    gradients = [
        torch.autograd.grad(y.square().sum(), x)[0] for y in (call(x), checkpoint(call, x, use_reentrant=False))
    ]
    torch.testing.assert_close(*gradients)


def test_compilers_see_transformers_own():
    layer, positions = layer_of()
    fast, x = replaced(layer), torch.randn(2, 20, 128)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    y = torch.compile(fast, backend=backend, fullgraph=True)(x, position_embeddings=positions)
    torch.testing.assert_close(y, layer(x, position_embeddings=positions), rtol=1e-4, atol=1e-5)
    assert "rsqrt" in graphs[0].code
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_left_to_transformers(isa, dtype):
    layer, positions = layer_of()
    layer.to(dtype)
    positions = [t.to(dtype) for t in positions]
    x = torch.randn(2, 20, 128, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(replaced(layer)(x, position_embeddings=positions), layer(x, position_embeddings=positions))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"])
def test_classes_of_many_models_are_known_by_what_they_compute(family):
    module = importlib.import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    config = getattr(importlib.import_module("transformers"), f"{family}Config")(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, head_dim=32
    )
    with torch.device("meta"):
        layer = getattr(module, f"{family}DecoderLayer")(config, 0)
    replace_modules(layer)
    mine = {type(m).__mro__[1].__name__ for m in layer.modules() if "_tempo_original" in vars(type(m))}
    # Gemma's norm multiplies by one more than its weight.
    assert mine == {"GatedMlp", "Rotated"} | ({"RmsNorm"} if family != "Gemma" else set())


def test_a_function_that_was_changed_is_left_alone(monkeypatch):
    monkeypatch.setattr(llama, "rotate_half", lambda x: -x)
    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", lambda self, hidden_states: hidden_states)
    layer, _ = layer_of()
    assert type(replaced(layer).self_attn) is llama.LlamaAttention
    assert type(replaced(layer).input_layernorm) is llama.LlamaRMSNorm


def test_hooks_on_the_activation_are_called(isa):
    layer, positions = layer_of()
    seen = []
    fast = replaced(layer)
    fast.mlp.act_fn.register_forward_hook(lambda *_: seen.append(True))
    fast(torch.randn(2, 20, 128), position_embeddings=positions)
    assert seen

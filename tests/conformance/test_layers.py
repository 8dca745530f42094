"""Every scheme × layer × dtype × (training, evaluation) against plain PyTorch, over generated shapes.

Bounds are on the relative error (norm) of the output and of every gradient. In float32 and float64 they are against
plain PyTorch in the same dtype. Half precisions round at every step, so plain PyTorch is itself off by about its
epsilon; there, both are compared with the float64 result, and the protected one may be off by the stated multiple.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conformance.cases import CASES, Case
from tempo import schemes

BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-5}
HALF_BOUNDS = {torch.bfloat16: 3e-2, torch.float16: 4e-3}

BOUNDS_WITH_CLOAK = BOUNDS | {torch.float32: 2e-5}
"""A cloak is added and taken off again."""

HALF_BOUNDS_WITH_CLOAK = HALF_BOUNDS | {torch.bfloat16: 2e-1}
"""What that rounds off in half precision is not averaged where a layer has two features (0.105 was seen)."""

_BLOCKS = {"mix_block": 2, "mix_row_block": 2, "insecure_small_blocks": True}
SMALL = {
    "mix": _BLOCKS,
    "mix-tuned": _BLOCKS | {"mix_cloak": 1, "mix_shield_rows": 1},
    "split": {"base": "public", "split_weight_bits": 16},
}
"""Settings that fit generated shapes; layers with fewer features than these stay trusted."""

BOUNDS_OF_INTEGERS = dict.fromkeys(BOUNDS, 3e-4)
"""Weights of 16 bits, rows of some more: so are layers, whatever dtype they compute in."""


def run(case: Case, module: nn.Module, dtype: torch.dtype, training: bool, g: Tensor) -> list[Tensor]:
    """The output and, in training, every gradient."""
    module.to(dtype).train(training)
    module.zero_grad()
    x = case.x.to(dtype).requires_grad_(training)
    if not training:
        with torch.no_grad():
            return [case.call(module, x)]
    y = case.call(module, x)
    y.backward(g.to(dtype).expand_as(y))
    gradients = [p.grad for p in module.parameters()]
    return [y.detach(), x.grad, *(grad for grad in gradients if grad is not None)]


def freeze(module: nn.Module) -> None:
    """What scheme `split` sends: matrices that are not trained."""
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.dim() < 2)


def goes_out(module: nn.Module, scheme: str) -> bool:
    """Whether every product of ``module`` has a block of features on both sides, and can be unfolded if it must be."""
    matrices = [
        (getattr(m, "groups", 1), p)
        for m in module.modules()
        for name, p in m.named_parameters(recurse=False)
        if name.endswith("weight") and p.dim() > 1
    ]
    if scheme == "split":
        return all(groups == 1 for groups, _ in matrices)
    return scheme not in SMALL or all(
        min(p.shape[1], p.shape[0] // groups) >= 2 and (scheme != "mix-tuned" or groups == 1 or p[0, 0].numel() == 1)
        for groups, p in matrices
    )


def error(actual: Tensor, expected: Tensor, scale: float) -> float:
    return float((actual.double() - expected.double()).norm() / max(float(expected.double().norm()), scale))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # plain PyTorch's own
@pytest.mark.parametrize("workers_used", [1, 2, 3])
@pytest.mark.parametrize("layer", CASES)
@pytest.mark.parametrize("scheme", schemes.names())
def test_layers_give_the_numbers_of_plain_pytorch(connect, scheme, layer, workers_used):
    # Workers of two operators, for schemes that then divide features between them, or need them.
    traits = schemes.create(scheme).traits
    operators = min(workers_used, traits.operators)
    if (traits.distinct_operators and workers_used != operators) or operators < traits.min_workers:
        pytest.skip("needs as many workers as operators")
    session = connect(workers_used, operators, scheme=scheme, **SMALL.get(scheme, {}))
    bounds = {"mix-tuned": BOUNDS_WITH_CLOAK, "split": BOUNDS_OF_INTEGERS}.get(scheme, BOUNDS)
    session._engine.crew.shares = [0.5, 0.3, 0.2][:workers_used]

    @settings(settings.get_profile("conformance"))
    @given(data=st.data(), dtype=st.sampled_from([*BOUNDS, *HALF_BOUNDS]), training=st.booleans())
    def check(data, dtype, training):
        torch.manual_seed(0)
        case = CASES[layer](data.draw)
        reference = copy.deepcopy(case.module)
        if traits.public_weights:
            freeze(reference)
        with torch.no_grad():
            g = torch.randn_like(case.call(reference, case.x))
        exact = run(case, copy.deepcopy(reference), torch.float64, training, g)
        plain = run(case, copy.deepcopy(reference), dtype, training, g)
        # Attention and normalisation can cancel almost to zero; errors are relative to the largest result then.
        scale = 1e-3 * max(float(t.norm()) for t in exact)
        before = session.stats()
        protected = session.protect(copy.deepcopy(reference).to(dtype))
        for _ in range(2):  # the second time, layers that share their input do
            results = run(case, protected, dtype, training, g)
        used = session.stats() - before
        if goes_out(reference, scheme):
            assert used.flops_trusted == 0
            assert used.flops_offloaded > 0
            assert used.encryptions["x"] > 0
        session.unprotect(protected)
        assert len(results) == len(exact)
        for actual, same_dtype, true in zip(results, plain, exact, strict=True):
            assert actual.dtype == same_dtype.dtype
            assert actual.shape == same_dtype.shape
            if dtype in BOUNDS:
                assert error(actual, same_dtype, scale) <= bounds[dtype]
            else:
                half = HALF_BOUNDS_WITH_CLOAK if scheme == "mix-tuned" else HALF_BOUNDS
                assert error(actual, true, scale) <= half[dtype] + 2 * error(same_dtype, true, scale)

    check()

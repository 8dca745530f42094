"""The presets of mixing as a user meets them: safe sizes, shield rows, trusted layers, the numbers of plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from in_process import plain
from in_process import run as run_in_process
from torch import nn

from tempo import schemes
from tempo.errors import UnsafeError
from tempo.keys import KeySchedule
from tempo.settings import parse
from tempo.wire.messages import Linear


def relative(a, b):
    return float((a - b).norm() / b.norm())


def run(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


REFUSED = [
    ("mix", {"mix_block": 7}),
    ("mix", {"mix_row_block": 15}),
    ("mix", {"mix_cloak": 1}),
    ("mix", {"mix_cloak": 15}),
    ("mix-tuned", {"mix_block": 31}),
    ("mix-tuned", {"mix_row_block": 31}),
    ("mix-tuned", {"mix_rounds": 1}),
    ("mix-tuned", {"mix_cloak": 15}),
    ("mix-tuned", {"mix_cloak": 0}),
]


@pytest.mark.parametrize(("name", "sizes"), REFUSED)
def test_sizes_known_to_be_undone_are_refused(name, sizes):
    with pytest.raises(UnsafeError, match=next(iter(sizes))):
        schemes.create(name, parse(sizes))
    schemes.create(name, parse(sizes | {"insecure_small_blocks": True}))


@pytest.mark.parametrize("name", ["mix", "mix-tuned"])
def test_larger_sizes_are_taken_as_they_are(name):
    larger = {"mix_block": 40, "mix_row_block": 50, "mix_rounds": 2, "mix_cloak": 20, "mix_shield_rows": 3}
    scheme = schemes.create(name, parse(larger))
    sizes = scheme.block, scheme.row_block, scheme.rounds, scheme.cloak_rank, scheme.shield_rows
    assert sizes == tuple(larger.values())


def test_the_presets_are_what_their_traits_say():
    mix, tuned = schemes.create("mix"), schemes.create("mix-tuned")
    assert (mix.rounds, mix.cloak_rank, mix.traits.operators, mix.traits.fresh_every_call) == (1, 16, 1, False)
    assert (tuned.rounds, tuned.cloak_rank, tuned.traits.operators, tuned.traits.fresh_every_call) == (2, 16, 2, True)
    assert mix.traits.public_base_preset == tuned.name


@pytest.mark.parametrize("width", [32, 200, 383, 384, 1000])
def test_narrow_weights_are_mixed_by_one_dense_block_where_the_base_is_public(width):
    def blocks(scheme) -> list[int]:
        masks = scheme.feature_masks(KeySchedule().fresh(1, "w"), width, width, 1, torch.float32)
        return [batch.shape[1] for mask in masks for stage in mask.blocks for batch in stage.batches]

    assert all(32 <= side <= 63 for side in blocks(schemes.create("mix")))
    sides = blocks(schemes.create("mix-tuned"))
    assert sides == [width] * 2 if width < 384 else all(32 <= side <= 33 for side in sides)


@pytest.mark.parametrize("name", ["mix", "mix-tuned"])
@pytest.mark.parametrize("shields", [0, 5])
def test_rows_sent_are_what_the_planner_is_told(name, shields):
    scheme = schemes.create(name, parse({"mix_shield_rows": shields}))
    for rows in (1, 26, 27, 28, 32, 33, 100):
        x, w = torch.randn(rows, 40), torch.randn(50, 40)
        sent = len(run_in_process(scheme, x, w, torch.randn(rows, 50)).seen["x"][0])
        assert sent == scheme.rows_sent(rows) == max(32, rows + shields)


def test_masks_of_a_public_base_are_fresh_at_every_call(connect):
    session = connect(scheme="mix-tuned")
    model = session.protect(nn.Linear(40, 50)).eval()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 40))
    assert session.stats().encryptions == {"x": 3, "w": 3, "g": 0}


@pytest.mark.parametrize("data", ["even", "one large feature"])
@pytest.mark.parametrize("scheme", ["mix", "mix-tuned"])
def test_half_precision_travel_is_as_exact_as_plain_half_precision(scheme, data):
    # Orthogonal masks keep norms, and rounding errors with them; a cloak adds its own energy to the weight's. The slack
    # is for chance: single errors differ, and more where one feature carries most of the norm.
    torch.manual_seed(0)
    x, w = torch.randn(256, 400), torch.randn(200, 400)
    if data != "even":
        x[:, 3] *= 30
    g = torch.randn(256, 200)
    same = run_in_process(schemes.create("insecure-plain"), x, w, g, wire=torch.bfloat16)
    found = run_in_process(schemes.create(scheme), x, w, g, wire=torch.bfloat16)
    cloak = found.source.weight.cloak
    rho = float((cloak.U @ cloak.V).norm() / w.norm())
    slack = 1.05 if data == "even" else 1.15
    y, g, dx, dw = plain(Linear(), x.double(), w.double(), g.double())
    for actual, unmasked, true in ((found.y, same.y, y), (found.dx, same.dx, dx), (found.dw, same.dw, dw)):
        assert relative(actual.double(), true) <= slack * (1 + rho**2) ** 0.5 * relative(unmasked.double(), true)
    assert rho > 0.1


def test_a_layer_narrower_than_a_block_stays_trusted_and_says_why(connect):
    session = connect(scheme="mix")
    model = session.protect(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 10), nn.Linear(10, 40)))
    model(torch.randn(5, 64))
    wide, narrow, narrow_input = session.summary().lines
    assert wide.trusted == 0 < wide.offloaded
    assert narrow.offloaded == narrow_input.offloaded == 0
    assert "10 output features" in narrow.reason
    assert "10 input features" in narrow_input.reason


OPTIONS = [{}, {"mix_rounds": 2}, {"mix_condition": 4.0}, {"mix_rounds": 2, "mix_block": 40}, {"mix_shield_rows": 9}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", [1, 33, 150])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_linear_at_safe_sizes(connect, options, rows, dtype, bound):
    torch.manual_seed(0)
    session = connect(2, scheme="mix", **options)
    plain = nn.Linear(67, 101).to(dtype)
    protected = session.protect(copy.deepcopy(plain))
    x = torch.randn(rows, 67, dtype=dtype)
    for actual, expected in zip(run(protected, x), run(plain, x), strict=True):
        assert relative(actual, expected) <= bound
    assert session.stats().flops_trusted == 0


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_convolution_at_safe_sizes(connect, groups, batch, dtype, bound):
    torch.manual_seed(0)
    session = connect(2, scheme="mix")
    plain = nn.Conv2d(72, 66, 3, padding=1, stride=2, groups=groups).to(dtype)
    protected = session.protect(copy.deepcopy(plain))
    x = torch.randn(batch, 72, 5, 6, dtype=dtype)
    for actual, expected in zip(run(protected, x), run(plain, x), strict=True):
        assert relative(actual, expected) <= bound
    assert session.stats().flops_trusted == 0


def test_few_rows_are_filled_up_with_random_ones_never_zero():
    x, w = torch.randn(3, 40), torch.randn(50, 40)
    found = run_in_process(schemes.create("mix"), x, w, torch.zeros(3, 50))
    shield = found.source.secrets(0)["x_shield"]
    assert shield.shape == (29, 40)
    assert 0.9 < float(shield.norm(dim=1).mean()) / 40**0.5 < 1.2
    x_masked, g_masked = found.seen["x"][0], found.seen["g"][0]
    assert x_masked.shape == (32, 40)
    assert torch.linalg.matrix_rank(x_masked) == 32
    assert g_masked.shape == (32, 50)
    assert g_masked.count_nonzero() == g_masked.numel()
    # A gradient that is zero stays so.
    assert not found.dw.any()
    assert not found.dx.any()


def test_zeros_and_signs_of_the_input_do_not_survive():
    x, w = torch.relu(torch.randn(64, 64)), torch.randn(64, 64)
    masked = run_in_process(schemes.create("mix"), x, w, torch.randn(64, 64)).seen["x"][0]
    assert masked.count_nonzero() == masked.numel()
    assert 0.4 < float((masked > 0).double().mean()) < 0.6

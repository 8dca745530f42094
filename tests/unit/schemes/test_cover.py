"""Dead rows and columns are covered: the numbers stay those of plain PyTorch, and no mask shows through a zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import plain, run, targets
from torch import Tensor

from tempo import kernels
from tempo.keys import KeySchedule, Keystream
from tempo.schemes import cover
from tempo.schemes.mix import Mix
from tempo.schemes.mix_tuned import MixTuned
from tempo.wire.messages import Conv, Linear

UNHURRIED = settings(deadline=None, max_examples=40)
DOUBLE = torch.float64
LAYOUTS = st.sampled_from([("one",), ("one", "one"), ("one", "one", "one"), ("one", "other"), ("one", "other", "one")])


def stream() -> Keystream:
    return KeySchedule().fresh(1, "test").stream("cover")


def small(kind: type = Mix, **sizes) -> Mix | MixTuned:
    return kind(2, 3, insecure_small_blocks=True, dense_below=0, **sizes)


SCHEMES = st.sampled_from(
    [
        small(),
        small(rounds=2, shield_rows=2),
        small(cloak=2),
        small(MixTuned, cloak=2),
        small(MixTuned, cloak=1, shield_rows=3, condition=3.0),
    ]
)


def kill(draw, x: Tensor, axis: int) -> Tensor:
    """Zero some rows (0) or columns (1) of ``x``, possibly all; returns which."""
    dead = torch.tensor(draw(st.lists(st.booleans(), min_size=x.shape[axis], max_size=x.shape[axis])))
    if draw(st.integers(0, 9)):
        dead &= torch.rand(len(dead)) < 0.5
    x[(slice(None),) * axis + (dead,)] = 0
    return dead


def check(scheme, product, x, w, g, workers) -> None:
    y, _, dx, dw = plain(product, x, w, g)
    found = run(scheme, x, w, g, product, workers)
    scale = [(x.norm(), w.norm()), (g.norm(), w.norm()), (g.norm(), x.norm())]
    for actual, expected, (a, b) in zip((found.y, found.dx, found.dw), (y, dx, dw), scale, strict=True):
        assert float((actual - expected).norm()) <= 1e-12 * float(a * b) + 1e-35
    # What is exactly zero in plain PyTorch stays so: no optimizer with a memory sees noise there.
    for actual, operands in ((found.y, x), (found.dx, g)):
        assert not actual[operands.flatten(1).eq(0).all(1)].any()
    assert not found.dw[g.transpose(0, 1).flatten(1).eq(0).all(1)].any()
    if not isinstance(product, Conv) or product.groups == 1:
        assert not found.dw[:, x.transpose(0, 1).flatten(1).eq(0).all(1)].any()


@UNHURRIED
@given(st.data(), SCHEMES, LAYOUTS, st.integers(1, 12), st.integers(4, 9), st.integers(4, 9))
def test_linear_layers_with_dead_rows_and_columns(data, scheme, operators, rows, inputs, outputs):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x, w = torch.randn(rows, inputs, dtype=DOUBLE), torch.randn(outputs, inputs, dtype=DOUBLE)
    g = torch.randn(rows, outputs, dtype=DOUBLE)
    for operand in (x, g):
        for axis in (0, 1):
            kill(data.draw, operand, axis)
    check(scheme, Linear(), x, w, g, targets(*operators))


@UNHURRIED
@given(st.data(), SCHEMES, LAYOUTS, st.integers(1, 6), st.integers(1, 3))
def test_convolutions_with_dead_images_and_channels(data, scheme, operators, images, groups):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    inputs, outputs = groups * data.draw(st.integers(2, 4)), groups * data.draw(st.integers(2, 5))
    product = Conv((2, 1), (1, 0), (1, 2), groups)
    x, w = torch.randn(images, inputs, 5, 6, dtype=DOUBLE), torch.randn(outputs, inputs // groups, 3, 2, dtype=DOUBLE)
    g = torch.randn_like(plain(product, x, w)[0])
    for operand in (x, g):
        for axis in (0, 1):
            kill(data.draw, operand, axis)
    check(scheme, product, x, w, g, targets(*operators))


class Uncovered(Mix):
    """`mix` as it would be without: the control."""

    def cover(self, key, part, plain):
        return plain, cover.uncovered(plain)


def ranks_of_blocks(found, role: str, row_block: int) -> set[int]:
    """Ranks of what each block of the row mask mixed."""
    last = found.source.secrets(0)["l1_permutation"].long()
    masked = torch.empty_like(found.seen[role][0])
    masked[last] = found.seen[role][0]
    return {int(torch.linalg.matrix_rank(block, rtol=1e-9)) for block in masked.split(row_block)}


@pytest.mark.parametrize("role", ["x", "g"])
def test_no_block_of_rows_shows_a_column_of_its_mask(role):
    # The rank attack of the class token: where a block holds one live row, all its masked rows are multiples of that
    # row, and the factors are a column of L.
    torch.manual_seed(0)
    operands = {"x": torch.randn(128, 40, dtype=DOUBLE), "g": torch.randn(128, 48, dtype=DOUBLE)}
    alive = torch.randperm(128)[:6]
    dead = torch.ones(128, dtype=torch.bool)
    dead[alive] = False
    operands[role][dead] = 0
    w = torch.randn(48, 40, dtype=DOUBLE)
    control = ranks_of_blocks(run(Uncovered(), operands["x"], w, operands["g"]), role, 32)
    assert max(control) <= 6
    assert min(control) <= 2
    assert ranks_of_blocks(run(Mix(), operands["x"], w, operands["g"]), role, 32) == {32}


@pytest.mark.parametrize("role", ["x", "g"])
def test_no_dead_feature_shows_as_a_null_vector(role):
    torch.manual_seed(0)
    operands = {"x": torch.randn(128, 40, dtype=DOUBLE), "g": torch.randn(128, 48, dtype=DOUBLE)}
    operands[role][:, 7] = 0
    w = torch.randn(48, 40, dtype=DOUBLE)

    def least(scheme) -> float:
        sigma = torch.linalg.svdvals(run(scheme, operands["x"], w, operands["g"]).seen[role][0])
        return float(sigma[-1] / sigma[0])

    assert least(Uncovered()) < 1e-12
    assert least(Mix()) > 0.1


@pytest.mark.parametrize("kernel", kernels.available())
@settings(UNHURRIED, max_examples=25)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([(), (3,), (2, 2), (9, 8)]),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    st.booleans(),
    st.data(),
)
def test_what_is_dead_is_found_exactly(kernel, rows, columns, spatial, dtype, last, data):
    x = torch.randn(rows, columns, *spatial).to(dtype)
    dead_rows, dead_columns = kill(data.draw, x, 0), kill(data.draw, x, 1)
    for index in torch.randint(0, x.numel(), (3,)):  # a single element, too small to square, makes its row live
        row, column = int(index) // (x.numel() // rows), int(index) // (x.numel() // rows // columns) % columns
        x.view(-1)[index] = 1e-40
        dead_rows[row] = dead_columns[column] = False
    x[x.eq(0) & (torch.rand(x.shape) < 0.5)] = -0.0
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    with kernels.using(kernel):
        covered, found = cover.cover(stream(), x)
    if dead_columns.all():
        dead_rows[:] = True
    if dead_rows.all():
        assert found.empty
        assert covered.count_nonzero() == covered.numel()
        return
    expected = x.flatten(1).eq(0).all(1)
    assert torch.equal(found.rows, expected.nonzero().squeeze(1))
    assert torch.equal(found.columns, x.transpose(0, 1).flatten(1).eq(0).all(1).nonzero().squeeze(1))
    kept = torch.ones_like(x, dtype=torch.bool)
    kept[found.rows] = False
    kept[:, found.columns] = False
    assert torch.equal(covered[kept], x[kept])


@pytest.mark.parametrize("rows", [255, 256, 1000, 5000])
def test_a_column_of_many_rows_is_alive_by_any_one_of_them(rows):
    x = torch.zeros(rows, 32)
    x[:, 31] = 1
    alive = torch.randint(0, rows, (30,))
    x[alive, torch.arange(30)] = 1e-40
    _, found = cover.cover(stream(), x)
    assert found.columns.tolist() == [30]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_what_is_filled_in_has_the_operand_s_own_scale(scale):
    x = torch.randn(400, 50) * scale
    x[100:] = 0
    x[:, :10] = 0
    covered, found = cover.cover(stream(), x, fillers=3, shields=80)
    for values, energy in (
        (covered[100:400], 1.0),
        (covered[:100, :10], 1.0),
        (covered[-80:], cover.SHIELD_ENERGY),
    ):
        assert abs(float((values / scale).square().mean()) / energy - 1) < 0.2
    assert torch.equal(found.shield, covered[400:])


def test_tiny_gradients_are_not_taken_for_zeros():
    torch.manual_seed(0)
    x, w, g = torch.randn(64, 40), torch.randn(48, 40), torch.randn(64, 48) * 1e-25
    g[5:9] = 0
    found, (_, _, dx, dw) = run(Mix(), x, w, g), plain(Linear(), x, w, g)
    for actual, expected in ((found.dx, dx), (found.dw, dw)):
        assert float((actual * 1e25 - expected * 1e25).norm() / (expected * 1e25).norm()) < 1e-5


@UNHURRIED
@given(
    st.integers(1, 400), st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.integers(1, 40), st.booleans()
)
def test_rows_are_sent_again_only_where_that_is_cheaper(rows, inputs, outputs, dead, multiple, want_dw):
    g = torch.randn(rows, outputs)
    g[torch.rand(rows) < dead] = 0
    alive = (g != 0).any(1).nonzero().squeeze(1).tolist()
    chosen = cover.rows_to_repeat(g, (rows, inputs), (outputs, inputs), multiple, want_dw=want_dw)
    if chosen is None:
        return
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(alive) <= set(chosen.tolist())
    assert len(chosen) == max(multiple, -(-len(alive) // multiple) * multiple)
    spared = rows - len(chosen)
    masking = cover.MASK_MULTIPLICATIONS * (spared * (inputs + outputs) - inputs * outputs)
    assert masking + spared * inputs * outputs * want_dw > 0


def test_class_tokens_are_sent_again_and_a_few_masked_labels_are_filled():
    g = torch.zeros(4160, 768)
    g[::65] = 1
    rows = cover.rows_to_repeat(g, (4160, 768), (768, 768), 32, want_dw=True)
    assert torch.equal(rows, torch.arange(0, 4160, 65))
    g[:] = 1
    g[::65] = 0
    assert cover.rows_to_repeat(g, (4160, 768), (768, 768), 32, want_dw=True) is None

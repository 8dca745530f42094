"""Scheme `split`: products come out exact, and each worker sees uniform numbers whatever the rows are.

Randomness is real here, so statistics have thresholds: each wrong alarm has a probability of 1e-7 or less.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import empty, targets
from scipy.stats import chi2, norm
from sharing import Exchange, share, total
from torch import Tensor, nn

from tempo import kernels
from tempo.errors import SchemeError, SettingsError, WorkerFailedError, WorkerLiedError
from tempo.schemes import create
from tempo.schemes.fixed_point import combine_rows, most_omega, share_rows
from tempo.schemes.split import Split
from tempo.settings import Settings
from tempo.verify.field import row_sums
from tempo.wire.messages import Linear
from tempo.wire.residues import HALF, P, expand
from tempo.worker.lying import LIES

UNHURRIED = settings(deadline=None, max_examples=40)
ALARM = 1e-7
TINY = torch.finfo(torch.float32).tiny

ROWS = {
    "normal": lambda t, d: torch.randn(t, d),
    "zeros": lambda t, d: torch.zeros(t, d),
    "one-hot": lambda t, d: torch.eye(d)[torch.arange(t) % d],
    "constant": lambda t, d: torch.full((t, d), -3.25),
    "huge": lambda t, d: 1e30 * torch.randn(t, d),
    "tiny": lambda t, d: 1e-30 * torch.randn(t, d),
    "mixed": lambda t, d: torch.randn(t, d) * torch.logspace(-30, 28, t)[:, None] * torch.logspace(-3, 3, d),
    "denormal": lambda t, d: 1e-40 * torch.randn(t, d),
}
"""Rows that somebody might want to tell from others, or that might overflow."""


@st.composite
def products(draw):
    rows, inputs, outputs = (draw(st.integers(1, 20)) for _ in range(3))
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    kind, back = draw(st.sampled_from(sorted(ROWS))), draw(st.sampled_from(sorted(ROWS)))
    w = torch.randn(outputs, inputs) * torch.logspace(-3, 3, outputs)[:, None]
    w[:: draw(st.integers(1, 4))] *= draw(st.sampled_from([0.0, 1.0]))
    return ROWS[kind](rows, inputs), w, ROWS[back](rows, outputs)


# --- what comes out ---------------------------------------------------------------------------------------------------


@UNHURRIED
@given(products(), st.integers(1, 3), st.integers(4, 16))
def test_products_are_those_of_integers_exactly(product, colluders, bits):
    x, w, g = product
    exchange = Exchange.of(w, colluders, bits)
    w_q, scales = exchange.w_q.long(), exchange.weight.scales
    forward = exchange.send(x)
    backward = exchange.send_back(forward, g)
    for sent, rows, scaled, there, found in (
        (forward, x, None, w_q.t(), exchange.y(forward)),
        (backward, g, scales, w_q, exchange.dx(backward)),
    ):
        steps = sent._shares.steps
        x_q = total([share(operand) for operand in sent.operands])
        exact = x_q @ there  # of int64: far from overflowing at these sizes
        assert int(exact.abs().max()) <= HALF
        numbers = exact.float() * steps
        assert torch.equal(found, numbers if scaled is not None else numbers * scales)
        meant = (rows if scaled is None else rows * scaled).double()
        # Half a step, and what float32 rounds off quotients and products.
        assert bool(((x_q * steps.double() - meant).abs() <= steps.double() * (0.5 + x_q.abs() * 2.0**-22)).all())


@UNHURRIED
@given(products(), st.integers(4, 16))
def test_numbers_are_plain_pytorch_s_within_rounding(product, bits):
    """As the page of the scheme says: half a step for each element of a row, and for each of a weight."""
    x, w, g = product
    exchange = Exchange.of(w, 1, bits)
    forward = exchange.send(x)
    backward = exchange.send_back(forward, g)
    scales, x, w, g = exchange.weight.scales.double(), x.double(), w.double(), g.double()
    near = exchange.w_q.double() * scales[:, None]
    assert bool(((near - w).abs() <= scales[:, None] * 0.5001).all())
    slack = 1 + 1e-5
    bound = forward._shares.steps.double() / 2 * near.abs().sum(1) * slack + 1e-6 * (x.abs() @ near.abs().t())
    assert bool(((exchange.y(forward) - x @ near.t()).abs() <= bound + TINY).all())
    bound = backward._shares.steps.double() / 2 * exchange.w_q.double().abs().sum(0) * slack
    bound = bound + 1e-6 * (g.abs() @ near.abs()) + TINY * len(w) * 2.0**bits
    assert bool(((exchange.dx(backward) - g @ near).abs() <= bound).all())


@UNHURRIED
@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from(["aligned", "one", "flat", "random"]), st.data())
def test_no_row_is_so_long_that_a_sum_could_wrap(features, where, kind, data):
    """|x_q| ω ≤ HALF, so no sum with any column does, by Cauchy and Schwarz; for the longest columns too."""
    omega = 1 + where * (most_omega(features) - 1)
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    rows = {
        "aligned": torch.sign(torch.randn(3, features)) * torch.rand(3, 1).add(0.5),
        "one": torch.eye(features)[:3] * 1.9999999,
        "flat": torch.full((3, features), 1.0 / 3),
        "random": torch.randn(3, features),
    }[kind]
    scale = data.draw(st.sampled_from([1.0, 1e30, 1e-30, 1e-38, 2e-44, 3e-45, 1.5]))
    out = torch.empty(rows.shape, dtype=torch.int32)
    share_rows(rows * scale, None, omega, [], out, None)
    assert float(out.double().square().sum(1).max().sqrt()) * omega <= HALF


@pytest.mark.parametrize("bits", range(4, 17))
@pytest.mark.parametrize("outliers", [1.0, 30.0])
def test_the_longest_sums_fit_and_nearly_fill_the_residues(bits, outliers):
    """Rows that are parallel to what they meet, both ways: not one may wrap, and no bit is given away."""
    torch.manual_seed(bits)
    w = torch.randn(40, 60) * torch.logspace(-3, 3, 40)[:, None]
    w[:, 3] *= outliers
    exchange = Exchange.of(w, bits=bits)
    w_q, scales = exchange.w_q.long(), exchange.weight.scales
    forward = exchange.send(torch.cat([w_q.float(), w_q.sign().float(), 1e30 * w_q.float()]))
    backward = exchange.send_back(forward, torch.cat([w_q.t() / scales, w_q.t().sign() / scales]))
    for sent, there in ((forward, w_q.t()), (backward, w_q)):
        largest = int((total([share(operand) for operand in sent.operands]) @ there).abs().max())
        assert 0.99 * HALF < largest <= HALF


def test_more_bits_of_a_weight_leave_fewer_of_rows():
    """docs/schemes/split.md has a table."""
    torch.manual_seed(0)
    x, w = torch.randn(64, 2048), torch.randn(256, 2048)
    errors = {}
    for bits in (8, 12, 16):
        exchange = Exchange.of(w, 1, bits)
        errors[bits] = float((exchange.y(exchange.send(x)) - x @ w.t()).norm() / (x @ w.t()).norm())
    assert errors[12] < 1.1e-3 < errors[16] < 2e-3 < errors[8] < 1.2e-2


def test_a_row_that_is_not_finite_spoils_its_own_product_only():
    """Loss scalers look for gradients with infinity or NaN."""
    torch.manual_seed(0)
    w, g = torch.randn(6, 5), torch.randn(4, 6)
    g[1, 2], g[3, 0] = torch.inf, torch.nan
    exchange = Exchange.of(w)
    dx = exchange.dx(exchange.send_back(exchange.send(torch.randn(4, 5)), g))
    assert torch.isfinite(dx).all(1).tolist() == [True, False, True, False]
    assert not torch.isfinite(dx[[1, 3]]).any()


# --- what workers see -------------------------------------------------------------------------------------------------


def views(x: Tensor, g: Tensor, colluders: int = 1, w: Tensor | None = None, bits: int = 12) -> dict[int, Tensor]:
    """What each worker has of every row, by two calls with the same rows and one gradient: int32 (T, 2d + m)."""
    exchange = Exchange.of(torch.randn(g.shape[1], x.shape[1]) if w is None else w, colluders, bits)
    once, again = exchange.send(x), exchange.send(x)
    back = exchange.send_back(again, g)
    seen = [{o.worker: share(o) for o in sent.operands} for sent in (once, again, back)]
    return {worker: torch.cat([part[worker] for part in seen], 1) for worker in seen[0]}


def worst_p(view: Tensor) -> float:
    """The least p-value, times their number, of chi-squared tests of bytes, of neighbours, and of differences."""
    words = view.numpy().view(np.uint32).astype(np.int64)
    counted = [words >> shift & 255 for shift in (0, 8, 16, 24)]
    counted += [(words[:, 1:] >> 28 << 4) | (words[:, :-1] >> 28), (words[1:] >> 28 << 4) | (words[:-1] >> 28)]
    half = words.shape[1] // 3
    signed = view.numpy().astype(np.int64)
    for other in (1, 2):  # of the same row, in the other call and in the gradient
        counted.append((signed[:, :half] - signed[:, other * half : (other + 1) * half]) % P >> 24)
    counted += [np.diff(signed, axis=axis) % P >> 24 for axis in (0, 1)]
    p = []
    for values in counted:
        found = np.bincount(values.ravel(), minlength=256)
        p.append(chi2.sf(((found - found.mean()) ** 2 / found.mean()).sum(), 255))
    return min(p) * len(p)


@pytest.mark.parametrize("kind", ROWS)
def test_each_worker_sees_uniform_and_independent_numbers(kind):
    for colluders in (1, 2):
        for view in views(ROWS[kind](4096, 8), ROWS[kind](4096, 8), colluders).values():
            assert worst_p(view) > ALARM


def test_any_t_of_three_operators_see_independent_numbers():
    seen = views(ROWS["constant"](4096, 8), ROWS["constant"](4096, 8), 2)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert worst_p(torch.cat([seen[one][:, :8], seen[other][:, :16]], 1)) > ALARM
        assert worst_p(total([seen[one], seen[other]]).int()) > ALARM


def test_uniformity_is_a_test_that_can_fail():
    rows = torch.empty(4096, 24, dtype=torch.int32)
    uniform = expand(os.urandom(32), rows.clone())
    assert worst_p(uniform) > ALARM
    reused = uniform.clone()
    reused[:, 8:16] = reused[:, :8]
    assert worst_p(reused) < ALARM
    assert worst_p(uniform.bitwise_right_shift(1)) < ALARM  # 31 bits
    assert worst_p(uniform.clamp(-HALF // 2, HALF)) < ALARM


def accuracy(views: tuple[Tensor, Tensor]) -> float:
    """Of a small network that tells two kinds of rows by what a worker sees of them, on rows that it was not shown.

    It gets every bit of every word, and of differences of words that one row has in common.
    """
    labels = torch.randperm(2 * len(views[0]), generator=torch.Generator().manual_seed(0)) >= len(views[0])
    words = torch.empty(len(labels), views[0].shape[1], dtype=torch.int32)
    words[~labels], words[labels] = views
    third = words.shape[1] // 3
    parts = [words, *((words[:, :third].long() - words[:, i * third : (i + 1) * third]) % P for i in (1, 2))]
    bits = torch.cat([part.long() for part in parts], 1)[:, :, None] >> torch.arange(32) & 1
    features, target = bits.flatten(1).float().mul_(2).sub_(1), labels.float()
    half = len(labels) // 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(features.shape[1], 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for start in range(0, half, 256):
        part = slice(start, min(start + 256, half))
        loss = nn.functional.binary_cross_entropy_with_logits(network(features[part]), target[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(((network(features[half:]) > 0) == labels[half:]).float().mean())


SAMPLES = 80_000
CHANCE = 0.01
"""How far from a half the accuracy of guessing may be, over as many rows: more than five standard deviations."""
UP, DOWN = torch.full((SAMPLES, 2), 100.0), torch.full((SAMPLES, 2), -100.0)
"""Under a weight of ones and zeros, these are as far apart as integers can be."""


def simulated() -> Tensor:
    """What who has shapes and counts, and nothing else, can make: uniform numbers, drawn by the operating system."""
    return torch.frombuffer(bytearray(os.urandom(4 * 6 * SAMPLES)), dtype=torch.int32).view(SAMPLES, 6)


def test_chance_is_narrow_enough():
    assert 2 * norm.sf(CHANCE * 2 * SAMPLES**0.5) < ALARM


@pytest.mark.parametrize("worker", [0, 1])
def test_a_distinguisher_is_at_chance(worker):
    up, down = (views(x, -x, w=torch.eye(2), bits=2)[worker] for x in (UP, DOWN))
    assert abs(accuracy((up, down)) - 0.5) < CHANCE
    assert abs(accuracy((simulated(), up)) - 0.5) < CHANCE


def test_the_distinguisher_tells_broken_variants(monkeypatch):
    up, down = (views(x, -x, w=torch.eye(2), bits=2) for x in (UP, DOWN))
    assert accuracy((total([*up.values()]).int(), total([*down.values()]).int())) > 0.999  # both operators together
    reused = up[1].clone()  # the second call, of other rows, under the share of the first
    same = torch.cat([reused[:, :2], reused[:, :2], reused[:, 4:]], 1)
    other = torch.cat([reused[:, :2], total([reused[:, :2], torch.full((SAMPLES, 2), 12345)]).int(), reused[:, 4:]], 1)
    assert accuracy((same, other)) > 0.999

    def of_31_bits(seed: bytes, out: Tensor) -> Tensor:
        return expand(seed, out).bitwise_right_shift_(1)

    monkeypatch.setattr("tempo.schemes.fixed_point.expand", of_31_bits)
    with kernels.using(kernels.TORCH):  # which is what was just broken
        up, down = (views(x, -x, w=torch.eye(2), bits=2)[1] for x in (UP, DOWN))
    assert accuracy((up, down)) > 0.7


@UNHURRIED
@given(products(), st.integers(1, 3))
def test_all_operators_together_have_the_rows(product, colluders):
    """The positive control: one more than the bound, and nothing is hidden."""
    x, w, _ = product
    exchange = Exchange.of(w, colluders)
    sent = exchange.send(x)
    found = total([share(operand) for operand in sent.operands]) * sent._shares.steps.double()
    assert bool(((found - x).abs() <= sent._shares.steps.double() * 0.51 + 1e-6 * x.abs()).all())


def test_nothing_is_sent_that_was_sent_before():
    """Seeds and what is left are fresh for every call, gradient and repetition."""
    x, g = torch.randn(5, 4), torch.randn(5, 3)
    exchange = Exchange.of(torch.randn(3, 4), 2)
    sent = []
    for _ in range(4):
        forward = exchange.send(x)
        sent += [*forward.operands, *exchange.send_back(forward, g).operands, *exchange.send_back(forward, g).operands]
    contents = [tensor.numpy().tobytes() for operand in sent for tensor in operand.tensors.values()]
    assert len(set(contents)) == len(contents) == 4 * 3 * 3


def test_what_is_sent_has_a_form_that_depends_on_shapes_only():
    exchange = Exchange.of(torch.randn(3, 4))
    forms = set()
    for kind in ROWS:
        sent = exchange.send(ROWS[kind](5, 4))
        forms.add(tuple((o.worker, n, tuple(t.shape), t.dtype) for o in sent.operands for n, t in o.tensors.items()))
    assert forms == {((0, "seed", (32,), torch.uint8), (1, "x", (5, 4), torch.int32))}


# --- lies -------------------------------------------------------------------------------------------------------------


def exchanges(colluders: int = 1):
    torch.manual_seed(1)
    exchange = Exchange.of(torch.randn(7, 6), colluders)
    forward = exchange.send(torch.randn(5, 6))
    backward = exchange.send_back(forward, torch.randn(5, 7))
    return exchange, ((forward, exchange.y), (backward, exchange.dx))


@pytest.mark.parametrize("colluders", [1, 2])
@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_caught_and_its_worker_named(lie, colluders):
    exchange, ways = exchanges(colluders)
    for sent, decode in ways:
        for liar in range(colluders + 1):
            answers = exchange.answers(sent)
            LIES[lie](answers[liar], exchange.answers(exchange.send(torch.randn(5, 6)))[0].resize_as_(answers[liar]))
            with pytest.raises(WorkerLiedError, match=r"wrong in row \d") as caught:
                decode(sent, answers)
            assert caught.value.worker == liar


@UNHURRIED
@given(st.integers(0, 4), st.integers(0, 6), st.integers(1, P - 1), st.booleans())
def test_one_wrong_number_is_caught_however_small(row, column, error, back):
    exchange, ways = exchanges()
    sent, decode = ways[back]
    answers = exchange.answers(sent)
    part = answers[1]
    column %= part.shape[1]
    wrong = (int(part[row, column]) + error) % P
    part[row, column] = wrong if wrong <= HALF else wrong - P
    with pytest.raises(WorkerLiedError, match=f"row {row}") as caught:
        decode(sent, answers)
    assert caught.value.worker == 1


def test_answers_that_are_wrong_and_cancel_do_no_harm():
    exchange, ways = exchanges(2)
    for sent, decode in ways:
        answers = exchange.answers(sent)
        right = decode(sent, {worker: answer.clone() for worker, answer in answers.items()})
        error = expand(os.urandom(32), torch.empty_like(answers[0]))
        answers[0], answers[2] = total([answers[0], error]).int(), total([answers[2], -error]).int()
        assert torch.equal(decode(sent, answers), right)


def test_another_representative_of_a_residue_is_no_lie():
    exchange, ((sent, decode), _) = exchanges()
    answers = exchange.answers(sent)
    right = decode(sent)
    least = -(1 << 31)  # ≡ HALF - 2, mod p
    shift = total([torch.full_like(answers[0], least), -answers[0]]).int()
    answers[0].fill_(least)
    answers[1] = total([answers[1], -shift]).int()
    assert torch.equal(decode(sent, answers), right)


def test_the_check_accepts_the_kernel_of_its_vectors_and_nothing_else():
    """Errors that both secret vectors are orthogonal to are one in p²: who does not know them cannot do better."""
    exchange, ((sent, decode), _) = exchanges()
    r, s = ([int(v) for v in vector[:3]] for vector in exchange.weight.forward.out_of)
    cross = [r[1] * s[2] - r[2] * s[1], r[2] * s[0] - r[0] * s[2], r[0] * s[1] - r[1] * s[0]]
    error = torch.zeros(5, 7, dtype=torch.int64)
    error[2, :3] = torch.tensor([(c + HALF) % P - HALF for c in cross])
    answers = exchange.answers(sent)
    answers[0] = total([answers[0], error]).int()
    decode(sent, answers)
    for orthogonal_to_one_only in ([r[1], -r[0], 0], [s[1], -s[0], 0]):
        answers = exchange.answers(sent)
        error[2, :3] = torch.tensor([(c + HALF) % P - HALF for c in orthogonal_to_one_only])
        answers[0] = total([answers[0], error]).int()
        with pytest.raises(WorkerLiedError):
            decode(sent, answers)


def test_an_answer_that_changes_while_it_is_looked_into_is_an_error(monkeypatch):
    """As a worker on this machine could change it, in shared memory: wrong when added up, right when looked into."""
    _, ((sent, decode), _) = exchanges()

    def added_up(parts, *others):
        parts[0][0, 0] ^= 1
        sums = combine_rows(parts, *others)
        parts[0][0, 0] ^= 1
        return sums

    monkeypatch.setattr("tempo.schemes.split.combine_rows", added_up)
    with pytest.raises(WorkerFailedError, match="changed its answer"):
        decode(sent)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_too_few_operators_are_an_error():
    w = torch.randn(3, 4)
    for colluders, operators in ((1, ["one"]), (1, ["one", "one"]), (2, ["one", "other", "one"])):
        exchange = Exchange.of(w, colluders)
        with pytest.raises(SchemeError, match="nothing was sent"):
            exchange.weight.encode_input(
                torch.randn(2, 4), exchange.keys.fresh(1, "x"), targets(*operators), empty, lambda: w
            )


def test_gradients_of_weights_are_refused():
    exchange = Exchange.of(torch.randn(3, 4))
    sent = exchange.send(torch.randn(2, 4))
    with pytest.raises(SchemeError, match="frozen"):
        sent.encode_gradient(torch.randn(2, 3), exchange.keys.fresh(1, "g"), empty, None, None, want_dw=True)


def test_in_clear_it_is_refused():
    with pytest.raises(SettingsError, match="use TLS"):
        create("split", Settings(scheme="split", insecure_no_tls=True))


def test_weights_too_large_for_their_bits_stay():
    """Whatever the weight is, a row's step is then below a fifteenth of its root mean square."""
    for bits, features in ((16, 4000), (12, 64000), (8, 1000000)):
        assert Split(bits=bits).refuses(Linear(), (1, features), (8, features)) is None
        assert "too many features" in str(Split(bits=bits).refuses(Linear(), (1, 8), (2 * features, 8)))
    x, w = torch.ones(1, 4000), torch.ones(8, 4000)
    assert float(Exchange.of(w, bits=16).send(x)._shares.steps) < 1 / 15


def test_without_checks_a_lie_passes():
    """The control of all that is said of lies."""
    exchange, _ = exchanges()
    exchange.weight.scheme.policy.share = 0.0
    sent = exchange.send(torch.randn(5, 6))
    answers = exchange.answers(sent)
    answers[0][0, 0] ^= 1
    exchange.y(sent, answers)


@UNHURRIED
@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 3))
def test_sums_are_exact(rows, features, count):
    x, vectors = (expand(os.urandom(32), torch.empty(n, features, dtype=torch.int32)) for n in (rows, count))
    x.view(-1)[::3] = HALF
    x.view(-1)[1::3] = -HALF
    expected = (x.numpy().astype(object) @ vectors.numpy().astype(object).T + HALF) % P - HALF
    assert row_sums(x, vectors).tolist() == expected.tolist()

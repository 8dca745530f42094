"""The formulas of docs/plan.md, against values worked out by hand, and the laws that they obey."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo.plan.estimate import Assumptions, Estimate, attention_flops, estimate, peak_seconds
from tempo.plan.hardware import GPU, GPUS, Link, Workers
from tempo.plan.models import PRESETS, Shape
from tempo.plan.rates import Rates

TINY = Shape(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=10,
)
RATES = Rates(per_byte=1e-9, per_attention_flop=1e-10, measured="by hand", machine={})


def line(speed: float, latency: float = 0.0) -> Link:
    return Link(up=speed, down=speed, latency=latency)


@dataclass(frozen=True)
class Case:
    link: float
    cores: int
    sequence: int
    colluders: int
    utilisation: float
    gpu: str
    bits: int

    def estimate(self, shape: Shape = PRESETS["llama-2-7b"], rates: Rates = RATES) -> Estimate:
        assumed = Assumptions(
            sequence=self.sequence,
            cores=self.cores,
            colluders=self.colluders,
            utilisation=self.utilisation,
            weight_bits=self.bits,
        )
        return estimate(shape, GPUS[self.gpu], line(self.link), rates, assumed)


cases = st.builds(
    Case,
    link=st.floats(0.1, 400),
    cores=st.integers(1, 256),
    sequence=st.integers(1, 8192),
    colluders=st.integers(1, 7),
    utilisation=st.floats(0.05, 1),
    gpu=st.sampled_from(sorted(GPUS)),
    bits=st.integers(4, 16),
)


def test_products_of_a_block_share_inputs_as_they_travel():
    # q and two pairs of k, v of width 2 each; output; gate and up; down; twice; and the head.
    block = [(8, 8 + 4 + 4), (8, 8), (8, 32), (16, 8)]
    assert TINY.products == [*block, *block, (8, 10)]
    assert TINY.weights == 2 * (128 + 64 + 256 + 128) + 80
    features = 2 * (24 + 16 + 40 + 24) + 18
    # Nothing is trained before the first product: its outputs' gradients do not go out, nor do its inputs' come back.
    assert (TINY.sent, TINY.received) == (features - 16, features - 8)
    assert TINY.multiplications == 2 * TINY.weights - 128


def test_published_shapes_have_their_published_numbers_of_weights():
    seven, seventy = PRESETS["llama-2-7b"], PRESETS["llama-2-70b"]
    # All parameters, less the embedding, of as many elements as the head, and norms.
    assert seven.weights == 6_738_415_616 - 32000 * 4096 - 65 * 4096
    assert seventy.weights == 68_976_648_192 - 32000 * 8192 - 161 * 8192


def test_estimate_by_hand():
    gpu = GPU(name="one", memory_gib=1, float64=1e6, int8=1e6, hour=3.6)
    assumed = Assumptions(sequence=100, batch=50, cores=2, utilisation=0.5, core_hour=1.8, gigabyte=1000.0)
    found = estimate(TINY, gpu, line(0.001, 0.25), RATES, assumed)
    up, down, multiplications = 4 * TINY.sent, 2 * 4 * TINY.received, TINY.multiplications
    assert (found.bytes_up, found.bytes_down) == (up, down)
    assert found.attention_seconds == pytest.approx(7 * 100 * 8 * 2 * 1e-10)
    assert found.trusted_seconds == pytest.approx((up + down) * 1e-9 + found.attention_seconds)
    assert found.wire_seconds == pytest.approx(8 * down / 1e6)
    assert found.worker_seconds == pytest.approx(2 * multiplications / 5e5)
    assert found.bottleneck == "wire"
    assert found.tokens_per_second == pytest.approx(1 / found.wire_seconds)
    requests = 2 * (4 * 2 + 1) - 1
    assert found.wire_seconds_in_turn == pytest.approx(8 * (up + down) / 1e6 + requests * 0.25 / 50)
    in_turn = found.trusted_seconds / 2 + found.wire_seconds_in_turn + found.worker_seconds
    assert found.tokens_per_second_in_turn == pytest.approx(1 / in_turn)
    assert found.cores_needed == 1
    hour, traffic = 2 * 3.6 + 2 * 1.8, 1e6 * (up + down) / 1e9 * 1000
    assert found.cost == pytest.approx(1e6 * found.wire_seconds / 3600 * hour + traffic)
    assert found.cost_in_turn == pytest.approx(1e6 * in_turn / 3600 * hour + traffic)


def test_workers_that_are_there_count_as_measured():
    seen = Workers(name="cpu", memory_gib=1, token_seconds=0.25, link=Link(up=1.0, down=2.0, latency=0.5))
    found = estimate(TINY, seen, seen.link, RATES, Assumptions(utilisation=0.5, batch=10))
    assert (found.worker, found.arithmetic, found.worker_seconds) == ("cpu", "as measured", 0.25)
    up, down = 8e-9 * found.bytes_up, 8e-9 * found.bytes_down / 2
    assert found.wire_seconds == pytest.approx(max(up, down))
    assert found.wire_seconds_in_turn == pytest.approx(up + down + 17 * 0.5 / 10)


def test_limbs_of_eight_bits_multiply_operations():
    gpu = GPU(name="one", memory_gib=1, float64=1, int8=4, hour=0)
    once = 2 * TINY.multiplications
    assert peak_seconds(TINY, gpu, 8) == {"float64": once, "int8": once}
    assert peak_seconds(TINY, gpu, 15) == {"float64": once, "int8": 2 * once}
    assert peak_seconds(TINY, gpu, 16) == {"float64": once}


def test_a_gpu_multiplies_by_the_faster_way():
    for speed, way in ((7.0, "float64"), (9.0, "int8")):
        gpu = GPU(name="one", memory_gib=1, float64=1, int8=speed, hour=0)
        found = estimate(TINY, gpu, line(1.0), RATES, Assumptions(utilisation=0.5))
        assert found.arithmetic == way
        assert found.worker_seconds == pytest.approx(2 * 2 * TINY.multiplications * min(1.0, 8 / speed))


def test_attention_grows_with_the_length_of_sequences():
    assert attention_flops(TINY, 200) == 2 * attention_flops(TINY, 100) == 7 * 200 * 8 * 2


def test_a_model_is_divided_over_as_many_gpus_as_hold_it():
    found = {bits: estimate(PRESETS["llama-2-70b"], GPUS["a100"], line(10), RATES, Assumptions(weight_bits=bits))
             for bits in (8, 12)}  # fmt: skip
    assert {bits: one.workers_per_operator for bits, one in found.items()} == {8: 1, 12: 2}
    assert found[12].weight_bytes == 2 * found[8].weight_bytes == 2 * PRESETS["llama-2-70b"].weights


@given(cases)
def test_the_bottleneck_takes_longest_and_overlap_never_harms(case):
    found = case.estimate()
    parts = {
        "trusted cores": found.trusted_seconds / case.cores,
        "wire": found.wire_seconds,
        "workers": found.worker_seconds,
    }
    assert parts[found.bottleneck] == max(parts.values())
    assert found.tokens_per_second_in_turn <= found.tokens_per_second
    assert found.cost <= found.cost_in_turn


@given(cases)
def test_as_many_cores_as_needed_are_no_bottleneck_and_one_less_is(case):
    needed = case.estimate().cores_needed
    rest = max(case.estimate().wire_seconds, case.estimate().worker_seconds)
    assert case.estimate().trusted_seconds / needed <= rest * (1 + 1e-9)
    if needed > 1:
        assert case.estimate().trusted_seconds / (needed - 1) > rest * (1 - 1e-9)


@given(cases, st.sampled_from(["link", "cores", "utilisation"]))
def test_more_of_anything_is_never_slower(case, what):
    more = min(1.0, 2 * case.utilisation) if what == "utilisation" else 2 * getattr(case, what)
    better = Case(**{**vars(case), what: more})
    assert better.estimate().tokens_per_second >= case.estimate().tokens_per_second
    assert better.estimate().tokens_per_second_in_turn >= case.estimate().tokens_per_second_in_turn


@given(cases, st.sampled_from(["sequence", "colluders"]))
def test_longer_sequences_and_more_operators_are_never_faster(case, what):
    worse = Case(**{**vars(case), what: 2 * getattr(case, what)})
    assert worse.estimate().tokens_per_second <= case.estimate().tokens_per_second
    assert worse.estimate().cost_in_turn >= case.estimate().cost_in_turn


@given(cases, st.floats(1, 100))
def test_a_slower_trusted_side_needs_more_cores_in_proportion(case, factor):
    slower = msgspec.structs.replace(
        RATES, per_byte=factor * RATES.per_byte, per_attention_flop=factor * RATES.per_attention_flop
    )
    found = case.estimate()
    exact = found.trusted_seconds / max(found.wire_seconds, found.worker_seconds)
    assert case.estimate(rates=slower).cores_needed in {ceil(factor * exact * (1 + e)) for e in (-1e-9, 0, 1e-9)}

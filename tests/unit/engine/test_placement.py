"""The planner: what goes out, what stays, and the reason given."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo import schemes
from tempo.engine.measure import Measurement
from tempo.engine.placement import Planner
from tempo.schemes.base import Scheme

GPU = Measurement(latency_s=1e-4, upload_bytes_per_s=5e9, download_bytes_per_s=5e9, flops_per_s=1e14)
MODEM = Measurement(latency_s=0.1, upload_bytes_per_s=1e6, download_bytes_per_s=1e6, flops_per_s=1e14)

TEMPO, MIX, MIX_TUNED = (schemes.create(name) for name in ("tempo", "mix", "mix-tuned"))


@dataclass
class FakeLink:
    """A worker as the planner sees it: only its measurement."""

    measurement: Measurement

    def measure(self) -> Measurement:
        return self.measurement


def planner(*measurements: Measurement, placement: str = "auto") -> Planner:
    found = Planner(placement, [FakeLink(m) for m in measurements])  # type: ignore[list-item]
    found.trusted_flops_per_s = 1e11  # whatever this machine does, the decisions below should not depend on it
    return found


def decide(
    plan: Planner, rows: int, inputs: int, outputs: int, *, training: bool = True, scheme: Scheme = TEMPO
) -> tuple[bool, str]:
    flops = 2 * rows * inputs * outputs
    decision = plan.decide(scheme, (rows, inputs), (outputs, inputs), flops, torch.float32, training)
    return decision.offload, decision.reason


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000), st.booleans())
def test_all_sends_everything(rows, inputs, outputs, training):
    assert decide(planner(MODEM, placement="all"), rows, inputs, outputs, training=training) == (True, "offloaded")


def test_auto_sends_a_large_product():
    assert decide(planner(GPU), 16384, 2048, 2048) == (True, "offloaded")


def test_auto_keeps_a_small_product_and_says_what_it_would_cost():
    goes, reason = decide(planner(GPU), 16, 32, 10)
    assert not goes
    # 3 passes of 2·16·32·10 FLOPs at 1e11 FLOP/s are nothing beside two round trips of 0.1 ms.
    assert reason.startswith("too few FLOPs for its bytes: 0.00 ms here, 0.2")
    assert reason.endswith("ms to mask and send")


def test_a_slow_link_keeps_what_a_fast_one_sends():
    assert decide(planner(GPU), 4096, 1024, 1024)[0]
    assert not decide(planner(MODEM), 4096, 1024, 1024)[0]


def test_an_unchanged_weight_need_not_be_sent_again():
    # One row against a big weight: in training the weight travels every step, in evaluation it is there already.
    assert not decide(planner(GPU), 64, 4096, 4096, training=True)[0]
    assert decide(planner(GPU), 64, 4096, 4096, training=False)[0]
    assert decide(planner(GPU), 64, 4096, 4096, training=False, scheme=MIX)[0]
    # Unless its masks are fresh at every call.
    assert not decide(planner(GPU), 64, 4096, 4096, training=False, scheme=MIX_TUNED)[0]


@settings(deadline=None)
@given(st.integers(6, 14), st.integers(6, 12), st.booleans())
def test_more_rows_never_bring_a_product_home(log_rows, log_width, training):
    plan, width = planner(GPU), 1 << log_width
    if decide(plan, 1 << log_rows, width, width, training=training)[0]:
        assert decide(plan, 2 << log_rows, width, width, training=training)[0]


def test_a_dearer_mask_keeps_what_a_cheaper_one_sends():
    plan = planner(GPU)
    sent = [
        {width for width in range(32, 2048, 32) if decide(plan, 4096, width, width, scheme=scheme)[0]}
        for scheme in (TEMPO, MIX, MIX_TUNED)
    ]
    assert sent[0] > sent[1] > sent[2] > set()


def test_shield_rows_are_not_free():
    # Without them 8 rows of evaluation would pay; `mix` masks 32, and decodes as many.
    plan = planner(GPU)
    costs = [plan.estimate(MIX, (n, 512), (512, 512), 2 * n * 512 * 512, torch.float32, False) for n in (8, 32)]
    assert costs[0].mask == pytest.approx(costs[1].mask)
    assert costs[0].saved < costs[1].saved
    training = plan.estimate(MIX, (8, 512), (512, 512), 2 * 8 * 512 * 512, torch.float32, True)
    assert training.mask > 2 * 24 * 512 * 512 / 1e11  # besides, their share of the weight gradient is computed here


def test_rows_are_shared_in_proportion_to_speed():
    slow = Measurement(1e-4, 5e9, 5e9, flops_per_s=2.5e13)
    assert planner(GPU, slow).shares == pytest.approx([0.8, 0.2])

"""The planner: what goes out, what stays, and the reason given."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo import schemes
from tempo.engine.costs import Rates
from tempo.engine.geometry import flops
from tempo.engine.measure import Measurement
from tempo.engine.placement import Planner
from tempo.schemes.base import Scheme
from tempo.settings import parse
from tempo.wire.messages import Linear

GPU = Measurement(latency_s=1e-4, upload_bytes_per_s=5e9, download_bytes_per_s=5e9, flops_per_s=1e14)
MODEM = Measurement(latency_s=0.1, upload_bytes_per_s=1e6, download_bytes_per_s=1e6, flops_per_s=1e14)

TEMPO, MIX, MIX_TUNED = (schemes.create(name) for name in ("tempo", "mix", "mix-tuned"))
MASK = {TEMPO: 1.5e-9, MIX: 5e-9, MIX_TUNED: 8e-9}
NAMES = ("w", "x", "y", "g", "dx", "dw")


@dataclass
class FakeLink:
    """A worker as the planner sees it: only its measurement."""

    measurement: Measurement

    def measure(self) -> Measurement:
        return self.measurement


class FakeCosts:
    """A machine on which decisions do not depend."""

    def rates(self, scheme, product, x, w, dtype) -> Rates:
        return Rates(dict.fromkeys(NAMES, MASK[scheme]), dict.fromkeys(NAMES, 1e-9), dict.fromkeys(NAMES, 0.0), 1e-11)


def planner(*measurements: Measurement, **fields) -> Planner:
    return Planner(parse(fields), [FakeLink(m) for m in measurements], FakeCosts())  # type: ignore[list-item]


def decide(
    plan: Planner, rows: int, inputs: int, outputs: int, *, training: bool = True, scheme: Scheme = TEMPO
) -> tuple[bool, str]:
    wants = {"want_dx": training, "want_dw": training}
    decision = plan.decide(scheme, Linear(), (rows, inputs), (outputs, inputs), torch.float32, **wants)
    return decision.offload, decision.reason


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000), st.booleans())
def test_all_sends_everything(rows, inputs, outputs, training):
    assert decide(planner(MODEM, placement="all"), rows, inputs, outputs, training=training) == (True, "offloaded")


def test_auto_sends_a_large_product_and_says_what_that_saves():
    goes, reason = decide(planner(GPU), 16384, 2048, 2048)
    assert goes
    # 3 passes of 2·16384·2048² FLOPs at 1e11 FLOP/s.
    assert reason.startswith("pays: 4123.17 ms here, ")


def test_auto_keeps_a_small_product_and_says_what_it_would_cost():
    goes, reason = decide(planner(GPU), 16, 32, 10)
    assert not goes
    # 3 passes of 2·16·32·10 FLOPs at 1e11 FLOP/s are nothing beside two round trips of 0.1 ms.
    assert reason == "does not pay: 0.00 ms here, 0.21 ms to send out (masks 0.00, checks 0.00, wire 0.20)"


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
    def estimate(rows: int, training: bool):
        shapes = (rows, 512), (512, 512)
        return planner(GPU).estimate(MIX, Linear(), *shapes, torch.float32, want_dx=training, want_dw=training)

    few, many = estimate(8, False), estimate(32, False)
    assert few.mask == pytest.approx(many.mask)
    assert few.saved < many.saved
    assert estimate(8, True).mask > 2 * 24 * 512 * 512 / 1e11  # besides, their share of dW is computed here


def test_only_gradients_that_are_wanted_count():
    def estimate(want_dx: bool, want_dw: bool):
        shapes = (4096, 512), (512, 512)
        return planner(GPU).estimate(TEMPO, Linear(), *shapes, torch.float32, want_dx=want_dx, want_dw=want_dw)

    forward = flops(Linear(), (4096, 512), (512, 512)) * 1e-11
    assert [estimate(*wants).saved / forward for wants in ((False, False), (True, False), (False, True))] == [
        pytest.approx(passes) for passes in (1, 2, 2)
    ]
    frozen, first, full = estimate(True, False), estimate(False, True), estimate(True, True)
    assert frozen.cost < full.cost  # a frozen weight is there already, and has no gradient
    assert first.cost < full.cost


def test_checks_that_are_not_made_cost_nothing():
    always, half, never = (
        planner(GPU, verify=verify).estimate(
            TEMPO, Linear(), (4096, 512), (512, 512), torch.float32, want_dx=True, want_dw=True
        )
        for verify in ("always", "sample:0.5", "off")
    )
    assert never.check == 0
    assert half.check == pytest.approx(always.check / 2)
    assert always.mask == never.mask


def test_narrow_numbers_travel_faster():
    wide, narrow = (
        planner(GPU, wire_dtype=dtype).estimate(
            TEMPO, Linear(), (4096, 512), (512, 512), torch.float32, want_dx=True, want_dw=True
        )
        for dtype in ("float32", "bfloat16")
    )
    assert narrow.wire < 0.6 * wide.wire


def test_rows_are_shared_in_proportion_to_speed():
    slow = Measurement(1e-4, 5e9, 5e9, flops_per_s=2.5e13)
    assert planner(GPU, slow).shares == pytest.approx([0.8, 0.2])


def parts(plan: Planner, rows: int = 4096, scheme: Scheme = TEMPO, width: int = 1024) -> int:
    return plan.parts(scheme, (rows, width), (width, width), torch.float32, training=True)


def test_calls_are_parted_where_masks_and_workers_take_long():
    slow = Measurement(1e-4, 5e9, 5e9, flops_per_s=1e12)
    assert 1 < parts(planner(slow, overlap="auto")) <= 4
    assert parts(planner(Measurement(0.0, 1e15, 1e15, flops_per_s=1e18), overlap="auto")) == 1  # nothing to hide behind
    assert (
        parts(planner(Measurement(1.0, 5e9, 5e9, flops_per_s=1e12), overlap="auto")) == 1
    )  # each part is one more round trip
    assert parts(planner(slow, overlap="auto"), rows=64, width=4096) == 1  # and one more gradient of the weight
    assert parts(planner(slow, placement="all", overlap="auto")) == 1  # nothing is measured


def test_calls_are_parted_as_the_user_says_unless_masks_would_be_worse():
    assert [parts(planner(GPU, placement="all", overlap=n)) for n in (1, 2, 3, 4)] == [1, 2, 3, 4]
    plan = planner(GPU, overlap=4)
    assert parts(plan, rows=3) == 3
    assert parts(plan, rows=100, scheme=MIX) == 3  # a part of 25 rows would be filled up to a block of 32
    assert parts(plan, rows=20_000, scheme=MIX) == 1  # more rows get larger blocks

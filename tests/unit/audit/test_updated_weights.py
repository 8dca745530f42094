"""Transcripts of sessions whose weights live on workers, and the truth behind them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tempo.audit import lab
from tempo.audit.solvers.unmixing import gather
from tempo.schemes.masks import Masks

STEPS = 6


def trained(update: str, scheme: str) -> lab.Lab:
    """Three layers, of which the middle ones are rekeyed after two steps of 128 rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 40))
    batches = [(torch.randn(128, 48), torch.randint(40, (128,))) for _ in range(STEPS)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    return lab.train(
        model,
        batches,
        lambda net, x, labels: F.cross_entropy(net(x), labels),
        optimizer=optimizer,
        scheme=scheme,
        update=update,
        rekey_rows=256,
    )


@pytest.mark.parametrize("scheme", ["mix", "tempo-signed", "insecure-plain"])
def test_the_truth_and_the_gradient_of_every_call_are_known_as_under_trusted_updates(scheme):
    runs = [trained(update, scheme) for update in ("trusted", "worker")]
    expected, found = ([(call, run.truth().of(call)) for call in run.views[0].calls] for run in runs)
    assert len(found) == len(expected) == 3 * STEPS
    assert len({call.weight for call, _ in found}) == 3 * STEPS / 2  # the same masks for two steps
    for (_, plain), (call, behind) in zip(expected, found, strict=True):
        for name in ("x", "w", "y", "g"):
            torch.testing.assert_close(behind[name], plain[name], rtol=1e-4, atol=1e-5)
        assert "dw" not in call.backward.tensors
        dw = torch.empty(call.w.shape)
        Masks(A=behind.mask("A"), P=behind.mask("P")).decode("dw", call.dw, [dw])
        torch.testing.assert_close(dw, behind["g"].T @ behind["x"], rtol=1e-4, atol=1e-5)


def test_attacks_on_reuse_take_rows_of_all_steps_under_one_mask():
    view = trained("worker", "mix").views[0]
    first = gather(view, "quick")[0]
    assert len({call.weight for call in first.calls}) == 1
    assert len({call.step for call in first.calls}) == 2
    assert len(first.x) == 256

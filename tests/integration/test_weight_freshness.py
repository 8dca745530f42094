"""A stored weight serves a call only if it is that call's weight, in that call's dtype."""

from __future__ import annotations

import copy

import torch
from torch import nn


def test_autocast_switched_on_and_off_never_meets_a_weight_of_the_other_dtype(connect):
    torch.manual_seed(0)
    plain, x = nn.Linear(32, 16), torch.randn(8, 32)
    session = connect(scheme="tempo")
    protected = session.protect(copy.deepcopy(plain))
    for _ in range(2):
        with torch.autocast("cpu"):
            half = protected(x)
        assert half.dtype == torch.bfloat16
        assert (protected(x) - plain(x)).norm() <= 1e-5 * plain(x).norm()
    assert session.stats().encryptions == {"x": 4, "w": 4, "g": 0}

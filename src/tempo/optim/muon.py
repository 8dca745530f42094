"""Muon with its iteration in the parameter's precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch

from tempo.optim.stepping import step_here
from tempo.wire import messages


@final
class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, but for the precision of its Newton-Schulz iteration: the parameter's instead of bfloat16.

    Rounding that coarse depends on the axes that a matrix is written in; without it a step commutes with rotations, so
    that a weight can be trained where it is masked.

    Arguments, errors and states are those of `torch.optim.Muon`.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as `step_here`."""
        return step_here(self, lambda group, p: rule(group, p.shape), closure)


def rule(group: Mapping[str, Any], shape: Sequence[int]) -> messages.Muon:
    """One step of a group on weights of that shape, as workers are told it."""
    lr, (rows, columns) = float(group["lr"]), shape
    if group["adjust_lr_fn"] == "match_rms_adamw":
        ratio = 0.2 * math.sqrt(max(rows, columns))
    else:
        ratio = math.sqrt(max(1, rows / columns))
    a, b, c = map(float, group["ns_coefficients"])
    return messages.Muon(
        lr=lr,
        adjusted_lr=lr * ratio,
        weight_decay=float(group["weight_decay"]),
        momentum=float(group["momentum"]),
        nesterov=group["nesterov"],
        coefficients=(a, b, c),
        eps=float(group["eps"]),
        iterations=int(group["ns_steps"]),
    )

"""What the steps of optimizers here have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tempo.wire.messages import Rule
from tempo.worker.update import apply


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What ``closure`` returns, which computes the loss and the gradients anew; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


@torch.no_grad()
def step_here(
    optimizer: torch.optim.Optimizer,
    rule: Callable[[Mapping[str, Any], Tensor], Rule],
    closure: Callable[[], Any] | None,
) -> Any:
    """One step on every parameter that has a gradient, by the arithmetic that workers use.

    Args:
        optimizer: Whose parameters and states.
        rule: The step of one of its groups on one parameter.
        closure: As for `torch.optim.Optimizer.step`.

    Returns:
        What ``closure`` returned, or None.
    """
    loss = evaluated(closure)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                apply(rule(group, p), p, p.grad, optimizer.state[p])
    return loss

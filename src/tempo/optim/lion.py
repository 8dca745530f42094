"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from tempo.optim.stepping import step_here
from tempo.wire import messages


@final
class Lion(Optimizer):
    """Chen et al., Symbolic Discovery of Optimization Algorithms (arXiv 2302.06675), algorithm 2.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate; three to ten times below AdamW's.
        betas: Of the interpolation that the sign is taken of, and of the momentum; each in [0, 1).
        weight_decay: Decoupled from the gradient, as in AdamW; three to ten times AdamW's.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr is {lr}; it must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; both must be in [0, 1)")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}; it must not be negative")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as `step_here`."""
        return step_here(self, lambda group, _: rule(group), closure)


def rule(group: Mapping[str, Any]) -> messages.Lion:
    """One step of a group, as workers are told it."""
    beta1, beta2 = map(float, group["betas"])
    return messages.Lion(lr=float(group["lr"]), beta1=beta1, beta2=beta2, weight_decay=float(group["weight_decay"]))

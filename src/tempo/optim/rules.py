"""Which optimizers workers can run, and what a step of each is on the wire.

What is exact under which masks (design, "Where weights are updated"): element-wise arithmetic under signed
permutations, gradient descent and Muon under all orthogonal masks. One line in `KINDS` for each optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from tempo.optim import lion, muon
from tempo.wire import messages
from tempo.wire.messages import Rule

Group = Mapping[str, Any]
"""One of an optimizer's ``param_groups``."""


@dataclass(frozen=True, slots=True)
class Kind:
    """An optimizer that workers can run.

    Attributes:
        rotates: Whether it commutes with rotations, not only with signed permutations.
        linear: Whether it is linear in gradients, so that sketches can follow it.
        divisible: Whether parameters that share an input may be updated as one matrix.
        rule: The next step of a group, on weights of a shape, after so many.
        counts: Whether it counts steps.
    """

    rotates: bool
    linear: bool
    divisible: bool
    rule: Callable[[Group, Sequence[int], int], Rule]
    counts: bool = False


def _sgd(group: Group, shape: Sequence[int], steps: int) -> Rule:
    numbers = {name: float(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay")}
    return messages.Sgd(nesterov=group["nesterov"], maximize=group["maximize"], **numbers)


def _adam(group: Group, shape: Sequence[int], steps: int) -> Rule:
    numbers = {name: float(group[name]) for name in ("lr", "eps", "weight_decay")}
    first, second = map(float, group["betas"])
    return messages.Adam(
        beta1=first,
        beta2=second,
        decoupled=group["decoupled_weight_decay"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        steps=steps,
        **numbers,
    )


_ADAM = Kind(rotates=False, linear=False, divisible=True, rule=_adam, counts=True)

KINDS: Final[dict[type[torch.optim.Optimizer], Kind]] = {
    torch.optim.SGD: Kind(rotates=True, linear=True, divisible=True, rule=_sgd),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    lion.Lion: Kind(rotates=False, linear=False, divisible=True, rule=lambda group, *_: lion.rule(group)),
    muon.Muon: Kind(rotates=True, linear=False, divisible=False, rule=lambda group, shape, _: muon.rule(group, shape)),
}
"""By class, exactly: a subclass may do anything."""


def names(fits: Callable[[Kind], bool] = lambda _: True) -> str:
    """The optimizers that fit, for a message."""
    found = [cls for cls, kind in KINDS.items() if fits(kind)]
    return ", ".join(f"{cls.__module__.partition('.')[0]}.optim.{cls.__name__}" for cls in found) or "none"

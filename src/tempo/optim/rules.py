"""Which optimizers workers can run, and what a step of each is on the wire.

What is exact under which masks (design, "Where weights are updated"): element-wise arithmetic under signed
permutations, gradient descent and Muon under all orthogonal masks. One line in `KINDS` for each optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from tempo.optim.lion import Lion
from tempo.optim.muon import Muon
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
        keeps: Names of what a step keeps.
        counts: Whether it counts steps.
    """

    rotates: bool
    linear: bool
    divisible: bool
    rule: Callable[[Group, Sequence[int], int], Rule]
    keeps: Callable[[Group], Sequence[str]]
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


def _lion(group: Group, shape: Sequence[int], steps: int) -> Rule:
    first, second = map(float, group["betas"])
    return messages.Lion(float(group["lr"]), first, second, float(group["weight_decay"]))


def _muon(group: Group, shape: Sequence[int], steps: int) -> Rule:
    lr, (rows, columns), (a, b, c) = float(group["lr"]), shape, map(float, group["ns_coefficients"])
    ratio = math.sqrt(max(1, rows / columns))
    if group["adjust_lr_fn"] == "match_rms_adamw":
        ratio = 0.2 * math.sqrt(max(rows, columns))
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


def _averages(group: Group) -> Sequence[str]:
    return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))


_ADAM = Kind(rotates=False, linear=False, divisible=True, rule=_adam, keeps=_averages, counts=True)

KINDS: Final[dict[type[torch.optim.Optimizer], Kind]] = {
    torch.optim.SGD: Kind(
        rotates=True,
        linear=True,
        divisible=True,
        rule=_sgd,
        keeps=lambda group: ("momentum_buffer",) if group["momentum"] else (),
    ),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    Lion: Kind(rotates=False, linear=False, divisible=True, rule=_lion, keeps=lambda _: ("exp_avg",)),
    Muon: Kind(rotates=True, linear=False, divisible=False, rule=_muon, keeps=lambda _: ("momentum_buffer",)),
}
"""By class, exactly: a subclass may do anything."""


def names(fits: Callable[[Kind], bool] = lambda _: True) -> str:
    """The optimizers that fit, for a message."""
    found = [cls for cls, kind in KINDS.items() if fits(kind)]
    return ", ".join(f"{cls.__module__.partition('.')[0]}.optim.{cls.__name__}" for cls in found) or "none"

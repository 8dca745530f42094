"""`Session.optimizer`: an ordinary optimizer whose protected weights step on the workers that hold them.

The optimizer's class is swapped, as layers' are, so it stays the object that schedulers and loops know. Parameters that
are here step here, by its own code; it never sees the others.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import Tensor, nn

from tempo.engine.away import residence_of
from tempo.engine.residence import Residence, Terms
from tempo.engine.update_cost import update_cost
from tempo.errors import ProtectionWarning, UpdateError
from tempo.optim.rules import KINDS, Group, Kind, names
from tempo.optim.stepping import evaluated
from tempo.schemes.base import Scheme
from tempo.wire.messages import Rule
from tempo.worker.update import states

if TYPE_CHECKING:
    from tempo.engine.engine import Engine

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741 - of the optimizer

log = logging.getLogger("tempo")

_COMMUTES: Final[dict[str, Callable[[Kind], bool]]] = {
    "with any": lambda kind: True,
    "with rotations": lambda kind: kind.rotates,
    "not": lambda kind: False,
}


class GroupTerms(Terms):
    """The terms of parameters that are in one group of an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, group: Group, kind: Kind, shape: Sequence[int]) -> None:
        self.linear = kind.linear
        self._optimizer, self._group, self._kind, self._shape = optimizer, group, kind, shape
        self._before = 0.0

    def rule(self, steps: int) -> Rule:
        """With the group's present hyper-parameters."""
        return self._kind.rule(self._group, self._shape, int(self._before) + steps)

    def state(self, parameters: Sequence[nn.Parameter]) -> dict[str, Tensor]:
        """All but the number of steps, which is no secret."""
        states = [self._optimizer.state.get(p, {}) for p in parameters]
        self._before = float(states[0].get("step", 0))
        return {name: torch.cat([state[name] for state in states]) for name in _tensors(states[0])}

    def drop(self, parameters: Sequence[nn.Parameter]) -> None:
        """While it is elsewhere, what is here would be stale."""
        for parameter in parameters:
            self._optimizer.state.pop(parameter, None)

    def keep(self, parameters: Sequence[nn.Parameter], state: Mapping[str, Tensor], steps: int) -> None:
        """Where `torch.optim` keeps it."""
        sizes = [len(p) for p in parameters]
        for number, parameter in enumerate(parameters):
            kept = {name: tensor.split(sizes)[number].clone() for name, tensor in state.items()}
            if kept and self._kind.counts:
                kept["step"] = torch.tensor(self._before + steps)
            if kept:
                self._optimizer.state[parameter] = kept


class Updates:
    """The optimizers of a session whose weights workers update.

    Args:
        engine: The session's.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._optimizers: list[weakref.ref[OnWorkers]] = []
        engine.terms = self.terms
        engine.together = self.together

    def take(self, optimizer: O, layers: Mapping[nn.Parameter, Scheme]) -> O:
        """Let workers update those parameters of ``optimizer`` that are among ``layers``, given with their schemes.

        Raises:
            UpdateError: It cannot run under these masks, or not be verified.
        """
        own, kind = _own_class(optimizer), _kind_of(optimizer)
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        allowed = {id(p): scheme for p, scheme in layers.items() if id(p) in mine}
        if not allowed:
            raise UpdateError("session.optimizer(): none of its parameters is the weight of a layer that goes out")
        for scheme in dict.fromkeys(allowed.values()):
            _check(scheme, kind, optimizer, self._engine)
            broken = scheme.traits.known_breaks.get("momentum-on-workers")
            if broken and any(_kept(kind, group) for group in optimizer.param_groups):
                self._engine.warn_once(f"scheme {scheme.name!r}: {broken}", ProtectionWarning)
        optimizer.__class__ = type(
            own.__name__, (OnWorkers, own), {"__module__": own.__module__, "__doc__": own.__doc__}
        )
        taken: Any = optimizer
        taken._tempo = _Taken(own, kind, set(allowed))
        _keep_schedulers(taken)
        self._optimizers.append(weakref.ref(taken))
        return optimizer

    def for_free(
        self, optimizer: torch.optim.Optimizer, layers: Mapping[nn.Parameter, Scheme]
    ) -> dict[nn.Parameter, Scheme]:
        """Those of ``layers`` that workers may update under ``update="auto"``: exactly, and learn nothing more by it.

        Of the others, the log says why not, and what it would save.
        """
        free: dict[nn.Parameter, Scheme] = {}
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for scheme in dict.fromkeys(layers.values()):
            found = {p: scheme for p, other in layers.items() if other is scheme and id(p) in mine}
            try:
                kind = _kind_of(optimizer)
                _check(scheme, kind, optimizer, self._engine)
            except UpdateError as error:
                log.info("update='auto': weights are updated here; %s", error)
                continue
            if scheme.traits.lasting_masks:
                free |= found
            elif found:
                log.info("%s", self._forgone(scheme, kind, optimizer, found))
        return free

    def _forgone(self, scheme: Scheme, kind: Kind, optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]) -> str:
        rekey_rows = self._engine.settings.rekey_rows
        kept = max(len(_kept(kind, group)) for group in optimizer.param_groups)
        size = 2 * sum(w.numel() * w.itemsize for w in weights)
        costs = ((rows, update_cost(rows, rekey_rows, kept)) for rows in (rekey_rows >> shift for shift in (5, 3, 1)))
        shares = ", ".join(f"{max(0.0, cost.saved):.0%} at {rows:,}" for rows, cost in costs)
        return (
            f"update='auto': weights are updated here, since on workers masks of scheme {scheme.name!r} would stay as "
            f"they are for {rekey_rows:,} rows, however many steps that is. update='worker' would save, of "
            f"{size / 1e6:,.1f} MB per step for weights and their gradients, {shares} rows per step"
        )

    def terms(self, weights: Sequence[Tensor]) -> Terms | None:
        """How workers update ``weights``, or None where this side does."""
        found = self._group_of(weights)
        if found is None or not all(map(_may_leave, weights)):
            return None
        optimizer, group = found
        states = [optimizer.state.get(w, {}) for w in weights]
        if any(_tensors(s) != _tensors(states[0]) or s.get("step") != states[0].get("step") for s in states):
            return None
        shape = (sum(len(w) for w in weights), *weights[0].shape[1:])
        return GroupTerms(optimizer, group, optimizer._tempo.kind, shape)

    def together(self, weights: Sequence[Tensor]) -> bool:
        """Whether ``weights`` may be one product: updated alike, or all here."""
        return self._group_of(weights) is not None or not any(self._group_of([w]) for w in weights)

    def _group_of(self, weights: Sequence[Tensor]) -> tuple[OnWorkers, Group] | None:
        for ref in reversed(self._optimizers):  # the last that was given a weight has it
            optimizer = ref()
            groups = [] if optimizer is None else [optimizer._tempo_group(w) for w in weights]
            if optimizer is None or not groups or groups[0] is None:
                continue
            alike = all(group is groups[0] for group in groups)
            return (optimizer, groups[0]) if alike and (len(groups) == 1 or optimizer._tempo.kind.divisible) else None
        return None


class _Taken:
    """What a taken optimizer knows of its session."""

    def __init__(self, own: type[torch.optim.Optimizer], kind: Kind, allowed: set[int]) -> None:
        self.own, self.kind, self.allowed = own, kind, allowed
        self.groups: dict[int, Group] = {}
        self.seen = 0
        """Groups that `groups` was made of."""


class OnWorkers(torch.optim.Optimizer):
    """Mixin of the class of an optimizer whose protected weights step on workers."""

    _tempo: _Taken

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, of the weights on workers and of those here."""
        loss = evaluated(closure)
        for residence in self._tempo_residences():
            residence.update()
        with self._tempo_here():
            super().step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ever, and on workers."""
        for residence in self._tempo_residences():
            residence.discard()
        with self._tempo_here():
            super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As ever; what workers keep is fetched."""
        self._tempo_recall()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ever; workers get it with the next training call."""
        self._tempo_recall()
        super().load_state_dict(state_dict)

    def _tempo_residences(self) -> list[Residence]:
        found = (residence_of(p) for group in self.param_groups for p in group["params"])
        return list(dict.fromkeys(residence for residence in found if residence is not None))

    def _tempo_recall(self) -> None:
        for residence in self._tempo_residences():
            if residence.lost is None:  # else what it kept is about to be loaded anew
                residence.recall()

    def _tempo_group(self, weight: Tensor) -> Group | None:
        """The group of a weight that workers may update."""
        taken = self._tempo
        if len(self.param_groups) != taken.seen:
            taken.groups = {
                id(p): group for group in self.param_groups for p in group["params"] if id(p) in taken.allowed
            }
            taken.seen = len(self.param_groups)
        return taken.groups.get(id(weight))

    @contextmanager
    def _tempo_here(self) -> Iterator[None]:
        """With those parameters only that are here."""
        whole = [group["params"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["params"] = [p for p in group["params"] if residence_of(p) is None]
            yield
        finally:
            for group, parameters in zip(self.param_groups, whole, strict=True):
                group["params"] = parameters


def clip_grad_norm_(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_` with the 2-norm, gradients on workers included.

    Raises:
        UpdateError: Only some of the parameters that share an input are given.
    """
    away = list(dict.fromkeys(residence for p in parameters if (residence := residence_of(p)) is not None))
    given = {id(p) for p in parameters}
    for residence in away:
        if any(id(p) not in given for p in residence.parameters):
            raise UpdateError(f"clip_grad_norm_(): {residence.name!r} are one gradient on a worker; give all of them")
    here = [p for p in parameters if residence_of(p) is None]
    part = torch.nn.utils.get_total_norm([p.grad for p in here if p.grad is not None])
    lengths = [residence.norm() for residence in away if residence.gradient]
    total: Tensor = torch.linalg.vector_norm(torch.tensor([float(part), *lengths], dtype=torch.float64)).to(part.dtype)
    torch.nn.utils.clip_grads_with_norm_(here, max_norm, total)
    factor = min(1.0, max_norm / (float(total) + 1e-6))
    for residence in away:
        if residence.gradient:
            residence.scale *= factor
    return total


def _own_class(optimizer: torch.optim.Optimizer) -> type[torch.optim.Optimizer]:
    """Its class before a session took it: perhaps an earlier one, which is over."""
    return optimizer._tempo.own if isinstance(optimizer, OnWorkers) else type(optimizer)


def _kind_of(optimizer: torch.optim.Optimizer) -> Kind:
    own = _own_class(optimizer)
    kind = KINDS.get(own)
    if kind is None:
        hint = "; torch.optim.Muon rounds to bfloat16, which masks do not commute with: use tempo.optim.Muon"
        raise UpdateError(
            f"workers cannot run {own.__module__}.{own.__name__}: they can {names()}"
            f"{hint if own is torch.optim.Muon else ''}; or use update='trusted'"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise UpdateError("workers cannot run an optimizer with differentiable=True; or use update='trusted'")
    return kind


def _check(scheme: Scheme, kind: Kind, optimizer: torch.optim.Optimizer, engine: Engine) -> None:
    name, commutes = type(optimizer).__name__, _COMMUTES[scheme.commutes]
    if not commutes(kind):
        raise UpdateError(
            f"{name} does not commute with the masks of scheme {scheme.name!r}, so it cannot run on masked weights: "
            f"under this scheme workers can run {names(commutes)}; under 'tempo-signed' {names()}; "
            "or use update='trusted'"
        )
    if engine.verifier.policy.share and not kind.linear:
        checked = names(lambda kind: kind.linear and commutes(kind))
        raise UpdateError(
            f"verify={engine.settings.verify!r}: no check follows {name} on weights that this side does not have; "
            f"checked are {checked}; or use update='trusted', or verify='off'"
        )


def _keep_schedulers(optimizer: OnWorkers) -> None:
    """A scheduler made earlier has put the old class's `step`, wrapped, on the instance."""
    if "step" not in vars(optimizer):
        return

    def step(*args: Any, **kwargs: Any) -> Any:
        vars(optimizer)["_opt_called"] = True
        return type(optimizer).step(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    vars(optimizer)["step"] = step


def _may_leave(weight: Tensor) -> bool:
    """Whether nobody but the optimizer waits for its gradient."""
    hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return type(weight) is nn.Parameter and weight.requires_grad and not hooks


def _kept(kind: Kind, group: Group) -> Sequence[str]:
    """What the optimizer keeps of a weight in this group."""
    return states(kind.rule(group, (1, 1), 0))


def _tensors(state: Mapping[str, Any]) -> list[str]:
    return sorted(name for name, value in state.items() if name != "step" and isinstance(value, Tensor))

"""Puts all products of one step into one basis, by replaying the trusted part of the network between them.

The attacker runs the victim's architecture with every product answered from the transcript. Only the cheap, trusted
functions in between are computed; what they give must be the next product's input, up to a permutation and positive
scales of rows and channels. Matching finds the permutations, least squares the scales and the trusted parameters
(biases, BatchNorm). Where channels meet in a residual addition, all come into one basis.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tempo.audit.attack import NotApplicable
from tempo.audit.solvers.matching import assign, balance, match, stacks
from tempo.audit.solvers.placed import Placed, evenly, fit_scales, log_size
from tempo.audit.solvers.scales import channels, row_factors
from tempo.audit.solvers.skeleton import Place, Skeleton, along
from tempo.audit.transcript import Call
from tempo.audit.truth import Truth, Which

PASSES = 5
"""Times that outputs are placed in a sum and the sum is fitted, at the most."""

LOST = 0.5
"""Relative residual of a replayed input from which on assembling has failed."""

LIFT = 1e3
"""Added before ReLU to look behind it."""

FITTED = 1e-2
"""Relative residual of a replayed input below which nothing more is fitted."""

STEPS = 200
"""Steps of L-BFGS for the trusted parameters between products."""


class Assembly:
    """All products of one step, placed one after the other.

    Args:
        skeleton: Of the victim's architecture.
        calls: The step's calls by the names of their modules, in order.

    Raises:
        NotApplicable: The trusted part mixes channels, or the calls do not fit the architecture.
    """

    def __init__(self, skeleton: Skeleton, calls: dict[str, Call]) -> None:
        self.skeleton = skeleton
        self.calls = calls
        self.links = skeleton.links()
        self.placed: dict[str, Placed] = {}
        self.fitted: set[nn.Parameter] = set()
        self.front: list[nn.Parameter] = []
        """Trusted parameters before the first product: nothing in the transcript tells them."""

        self._weights = {module.weight for module in skeleton.modules.values()}
        self._basis: set[int] = set()
        self._components = _components(self.links)
        for parameter in skeleton.model.parameters():
            parameter.requires_grad_(False)

    @property
    def rows(self) -> int:
        """Samples in the step."""
        return len(next(iter(self.calls.values())).x)

    def place(self) -> str:
        """Place products until one does not fit.

        Returns:
            Its name; empty where all were placed.
        """
        for name in self.calls:
            placed = self._follow(name) if self.links[name] else self._enter(name)
            if placed.residual > LOST:
                return name
            self.placed[name] = placed
            component = self._components["y", name]
            placed.log_p = log_size(placed.raw_y(), 1)
            if component not in self._basis:
                self._basis.add(component)
                placed.outputs = torch.arange(len(placed.log_p))
        self._pair_rest()
        return ""

    def ends_in(self, name: str) -> bool:
        """Whether the network's output is that of product ``name``."""
        module = self.skeleton.modules[name]
        with torch.no_grad():
            self.skeleton.inputs_of, self.skeleton.outputs_of = {}, {}
            seen, output = self.skeleton.run(len(self.skeleton.samples))
            scores = getattr(output, "logits", output)
            x = seen[name]
            return isinstance(module, nn.Linear) and torch.equal(
                scores, nn.functional.linear(x, module.weight, module.bias)
            )

    def agreement(self, truth: Truth) -> float:
        """Share of live channels that are one and the same plain channel in all products that share them."""
        origins: dict[int, Tensor] = {}
        right: list[Tensor] = []
        for name, placed in self.placed.items():
            call = truth.of(placed.call)
            places = [("x", placed.inputs, "A"), ("y", placed.outputs, "P")]
            for kind, index, which in places:
                component = self._components[kind, name]
                if index is None or call.mask(cast("Which", which)).blocks:
                    right.append(torch.zeros(len(placed.log_p if kind == "y" else placed.log_kappa), dtype=torch.bool))
                    continue
                origin = call.permutation(cast("Which", which))[index]
                if component in origins:
                    plain = call["x"] if kind == "x" else call["y"]
                    live = plain.movedim(1, 0).flatten(1).std(1)[origin] > 0
                    right.append((origins[component] == origin)[live])
                elif not (kind == "x" and not self.links[name]):
                    origins[component] = origin
        return float(torch.cat(right).double().mean()) if right else 0.0

    def _pair_rest(self) -> None:
        """Place outputs that nothing under record takes in: their gradients are another addend's."""
        for name, placed in self.placed.items():
            if placed.outputs is None:
                component = self._components["y", name]
                self._pair(name, {("y", n) for n in self.placed if n != name and self._components["y", n] == component})
            if placed.outputs is None:
                raise NotApplicable(f"nothing tells which channel of {name}'s output is which")

    def _enter(self, name: str) -> Placed:
        """A product of the network's own input, or of what trusted layers made of it: its masked order is the basis."""
        if self.placed:
            raise NotApplicable(f"the input of {name} comes from trusted layers alone, in the midst of the network")
        x = self.calls[name].x
        self._basis.add(self._components["x", name])
        self.front = self._used(name)
        even = balance(x.flatten(2) if x.dim() > 2 else x[:, :, None])
        ratio = x.double().flatten(1).norm(dim=1) / even.flatten(1).norm(dim=1).clamp_min(1e-300)
        log_v = torch.where(ratio > 0, ratio, 1.0).log()
        kappa = torch.zeros(x.shape[1], dtype=torch.float64)
        return Placed(self.calls[name], torch.arange(len(x)), torch.arange(x.shape[1]), log_v, kappa, loose=True)

    def _follow(self, name: str) -> Placed:
        """A product of what earlier ones gave."""
        call, sources = self.calls[name], self.links[name]
        waiting = [n for kind, n in sources if kind == "y" and self.placed[n].outputs is None]
        if len(waiting) > 1:
            raise NotApplicable(f"several outputs of one basis meet first in the sum that goes into {name}")
        unsure = waiting[0] if waiting else None
        if unsure is not None:
            self._pair(unsure, sources)
        with torch.no_grad():
            replayed = self._replay(name)
        fresh = self._used(name)
        only = next(iter(sources))
        source = self.placed[only[1]] if len(sources) == 1 and only[0] == "y" else None
        value, gradient = replayed, None
        if source is not None and source.y().shape == replayed.shape:
            value, gradient = source.y(), source.g()  # before BatchNorm and activation there are no ties
        elif source is not None and len(self._norms(fresh)) == 1:
            value = self._before(name, self._norms(fresh)[0])
        if value.shape != call.x.shape:
            raise NotApplicable(f"{name} got {tuple(call.x.shape)}, where the architecture has {tuple(value.shape)}")
        found = match(stacks(value, gradient, output=True), stacks(call.x, call.dx, output=False))
        placed = Placed(
            call, found.rows, found.columns, torch.zeros(len(value)).double(), torch.zeros(value.shape[1]).double()
        )
        fit_scales(placed, replayed)
        # Through BatchNorm, gradients are not those of ReLU alone.
        gradients = (placed.raw_dx(), source.g()) if source is not None and not self._norms(fresh) else (None, None)
        factors = None if source is None else row_factors(placed.raw_x(), value, *gradients)
        if source is not None and factors is not None:
            if source.loose:
                wrong = factors[1] - factors[0]
                source.log_v += wrong
                value = value / along(wrong.exp(), value, 0)
                source.loose = bool((call.x != 0).all())
                placed.log_v = factors[1]
            else:
                placed.log_v = factors[0]
        values = {only: value} if source is not None else {}
        if unsure is None or self.placed[unsure].outputs is not None:
            self._fit_channels(name, placed, fresh, values)
        if unsure is not None and (self.placed[unsure].outputs is None or self._residual(name, placed) > FITTED):
            for _ in range(PASSES):
                before = self.placed[unsure].outputs
                self._place_sum(unsure, placed, name)
                self._fit_channels(name, placed, fresh, values)
                if before is not None and torch.equal(before, cast("Tensor", self.placed[unsure].outputs)):
                    break
        self._fit(name, placed, fresh)
        self.fitted |= set(fresh)
        return placed

    def _norms(self, parameters: list[nn.Parameter]) -> list[nn.modules.batchnorm._BatchNorm]:
        norms = [m for m in self.skeleton.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return [m for m in norms if any(m.weight is p for p in parameters)]

    def _before(self, name: str, norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
        """The one output behind ``name``'s input, pooled as on the way, but without BatchNorm and ReLU."""
        kept = norm.bias.data.clone()
        norm.bias.data.fill_(LIFT)  # nothing is below zero
        moments: list[Tensor] = []
        hook = norm.register_forward_pre_hook(lambda _, args: moments.append(args[0]))
        with torch.no_grad():
            lifted = self._replay(name) - LIFT
        hook.remove()
        norm.bias.data.copy_(kept)
        axes = [i for i in range(moments[0].dim()) if i != 1]
        variance, mean = torch.var_mean(moments[0], axes, correction=0)
        return lifted * along((variance + norm.eps).sqrt(), lifted, 1) + along(mean, lifted, 1)

    def _fit_channels(self, name: str, placed: Placed, fresh: list[nn.Parameter], values: dict[Place, Tensor]) -> None:
        """Fit ``x = relu(Σ α y + β)``, channel by channel, where BatchNorm or a bias gives α and β.

        Where the trusted functions are others, what comes of this is a start for `_fit` at best.
        """
        sums = dict(values)
        for kind, source in self.links[name]:
            if (kind, source) not in sums:
                sums[kind, source] = self.placed[source].x() if kind == "x" else self.placed[source].y()
        x = placed.raw_x()
        terms = {place: _like(term, x) for place, term in sums.items()}
        if any(term is None for term in terms.values()) or not bool((x == 0).any()):
            return
        norms = self._norms(fresh)
        owners = {("y", source): self._owner(source, norms) for kind, source in self.links[name] if kind == "y"}
        stack = torch.stack([term for term in terms.values() if term is not None])
        coefficients, beta, log_v = channels(x, stack, placed.log_v)
        kept = (placed.log_v.clone(), placed.log_kappa.clone(), [p.data.clone() for p in fresh])
        logs = {source: self.placed[source].log_p.clone() for kind, source in self.links[name] if kind == "y"}
        before = self._residual(name, placed)
        unit = torch.ones_like(beta)
        for place, a in zip(terms, coefficients, strict=True):
            if place[0] == "x" and bool((a > 0).all()):
                unit = a  # what is added as it is keeps its scale
        for place, a in zip(terms, coefficients, strict=True):
            norm = owners.get(place)
            if norm is not None:
                y = self.placed[place[1]].y()
                variance, mean = torch.var_mean(y, [i for i in range(y.dim()) if i != 1], correction=0)
                norm.weight.data.copy_(a / unit * (variance + norm.eps).sqrt())
                norm.bias.data.zero_()
                beta = beta + a * mean
            elif place[0] == "y":
                usable = a > 0
                self.placed[place[1]].log_p -= torch.where(usable, a, 1.0).log()
        for place in terms:
            norm, module = owners.get(place), self.skeleton.modules[place[1]]
            bias = norm.bias if norm is not None else module.bias if place[0] == "y" else None
            if bias is not None and any(bias is p for p in fresh):
                bias.data.copy_(beta / unit)
                break
        placed.log_v, placed.log_kappa = log_v, unit.log()
        if not self._residual(name, placed) < before:
            placed.log_v, placed.log_kappa = kept[:2]
            for parameter, old in zip(fresh, kept[2], strict=True):
                parameter.data.copy_(old)
            for source, log in logs.items():
                self.placed[source].log_p = log

    def _owner(
        self, source: str, norms: list[nn.modules.batchnorm._BatchNorm]
    ) -> nn.modules.batchnorm._BatchNorm | None:
        """The BatchNorm right behind a product's output: the next one in the order of modules."""
        order = list(self.skeleton.model.modules())
        for module in order[order.index(self.skeleton.modules[source]) + 1 :]:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                return module if any(module is norm for norm in norms) else None
            if module in self.skeleton.modules.values():
                break
        return None

    def _residual(self, name: str, placed: Placed) -> float:
        with torch.no_grad():
            x = placed.x()
            wrong = (self._replay(name) - x) * evenly(x)
            return float((wrong.square().sum() / (x * evenly(x)).square().sum().clamp_min(1e-300)) ** 0.5)

    def _pair(self, source: str, sources: set[Place]) -> None:
        """Place an output by its gradient, which is another addend's, but for BatchNorm."""
        addend = self.placed[source]
        for kind, name in sources:
            other = self.placed[name]
            ours, theirs = other.g() if kind == "y" else None, addend.call.g
            if ours is None or theirs is None:
                continue
            theirs = theirs.double()[addend.rows]
            theirs = theirs * along(addend.log_v.exp(), theirs, 0)
            ours, theirs = (t.movedim(1, -1).flatten(0, -2).T for t in (ours, theirs))
            if ours.shape == theirs.shape:
                addend.outputs = assign(
                    torch.corrcoef(torch.cat([ours, theirs]))[: len(ours), len(ours) :].nan_to_num()
                )

    def _place_sum(self, source: str, placed: Placed, name: str) -> None:
        """Find which channel of an input is the sum of which known one and which of ``source``'s output.

        Of every three channels, how much of the first the other two explain where it is positive: all of it, if they
        belong together and the scales of rows are right.
        """
        addend = self.placed[source]
        known = [
            self.placed[n].x() if kind == "x" else self.placed[n].y() for kind, n in self.links[name] if n != source
        ]
        x = placed.call.x.double()[placed.rows]
        x = x / along(placed.log_v.exp(), x, 0)
        y = addend.raw_y() / along(addend.log_v.exp(), addend.raw_y(), 0)
        terms = [term for term in (_like(t, x) for t in known) if term is not None and bool(term.any())]
        addition = _like(y, x)
        if len(terms) != 1 or addition is None:
            raise NotApplicable(f"the input of {name} is a sum of another kind than of two terms of its own shape")
        x, rest, y = (t.movedim(1, 0).flatten(1) for t in (x, terms[0], addition))
        explained = torch.zeros(len(x), len(rest), len(y)).double()
        for i, row in enumerate(x):
            live = row > 0
            if int(live.sum()) > 3:
                a, b, c = (t - t.mean(-1, keepdim=True) for t in (row[live], rest[:, live], y[:, live]))
                bb, cc, bc = b.square().sum(1)[:, None], c.square().sum(1), b @ c.T
                ab, ac = (b @ a)[:, None], c @ a
                up = ab.square() * cc - 2 * ab * ac * bc + ac.square() * bb
                explained[i] = up / (bb * cc - bc.square()).clamp_min(1e-30) / a.square().sum().clamp_min(1e-300)
        gain = -(1 - explained.clamp(0, 1) + 1e-9).log()
        placed.inputs = assign(gain.amax(2).T)
        addend.outputs = assign(gain[placed.inputs, torch.arange(len(rest))])

    def _replay(self, until: str) -> Tensor:
        """What the trusted part gives as the input of ``until``, from all that is placed."""
        self.skeleton.inputs_of = {name: placed.x() for name, placed in self.placed.items()}
        self.skeleton.outputs_of = {name: placed.y() for name, placed in self.placed.items()}
        seen, _ = self.skeleton.run(self.rows, until)
        return seen[until]

    def _used(self, name: str) -> list[nn.Parameter]:
        """Trusted parameters between placed products and the input of ``name``, not fitted yet."""
        known = self._weights | self.fitted | set(self.front)
        candidates = [p for p in self.skeleton.model.parameters() if p not in known]
        for parameter in candidates:
            parameter.requires_grad_()
        replayed = self._replay(name)
        used: list[nn.Parameter] = []
        if replayed.requires_grad:
            gradients = torch.autograd.grad(replayed.sum(), candidates, allow_unused=True)
            used = [p for p, gradient in zip(candidates, gradients, strict=True) if gradient is not None]
        for parameter in candidates:
            parameter.requires_grad_(False)
        return used

    def _fit(self, name: str, placed: Placed, fresh: list[nn.Parameter]) -> None:
        """Least squares for scales and trusted parameters on one replayed input, whatever the functions are."""
        placed.residual = self._residual(name, placed)
        loose = [p for p in self.placed.values() if p.loose]
        if placed.residual > FITTED:
            target = placed.x()
            weight = evenly(target) / (target * evenly(target)).square().mean().sqrt()
            ys = [self.placed[source] for kind, source in self.links[name] if kind == "y"]
            shift_v, shift_kappa = torch.zeros_like(placed.log_v), torch.zeros_like(placed.log_kappa)
            free = [shift_v, shift_kappa, *fresh, *(y.log_p for y in ys), *(p.log_v for p in loose)]
            for tensor in free:
                tensor.requires_grad_()
            optimizer = torch.optim.LBFGS(
                free, max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-12
            )

            def closure() -> Tensor:
                optimizer.zero_grad()
                replayed = self._replay(name)
                predicted = replayed * along(shift_v.exp(), replayed, 0) * along(shift_kappa.exp(), replayed, 1)
                value = ((predicted - target) * weight).square().mean()
                value.backward()
                return value

            optimizer.step(closure)
            for tensor in free:
                tensor.requires_grad_(False)
            placed.log_v = placed.log_v + shift_v
            placed.log_kappa = placed.log_kappa + shift_kappa
            placed.residual = self._residual(name, placed)
        for other in loose:
            other.loose = False


def _components(links: dict[str, set[Place]]) -> dict[Place, int]:
    """Numbers for sets of places whose channels are the same."""
    found: dict[Place, int] = {(kind, name): 2 * i + j for i, name in enumerate(links) for j, kind in enumerate("xy")}
    for name, sources in links.items():
        for source in sources:
            old, new = found["x", name], found[source]
            found = {place: new if number == old else number for place, number in found.items()}
    return found


def _like(term: Tensor, x: Tensor) -> Tensor | None:
    """A term of a sum in the shape of the sum: pixels as maps, or maps as pixels; None where it is of another size."""
    if term.shape == x.shape:
        return term
    if term.dim() == 2 and x.dim() > 2 and len(term) == len(x) * x[0, 0].numel():
        return term.reshape(len(x), *x.shape[2:], -1).movedim(-1, 1)
    if x.dim() == 2 and len(term) == len(x) and term[0, 0].numel() == 1:
        return term.flatten(1)
    return None

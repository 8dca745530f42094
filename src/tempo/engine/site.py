"""A site: one layer's place in a session. It decides where each call runs, and shares inputs with its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tempo.engine.adapters import Operands
from tempo.engine.autograd import of_our_own, offload
from tempo.engine.away import residence_of
from tempo.engine.dtypes import WIRE_DTYPES, compute_dtype
from tempo.engine.geometry import flops, output_shape
from tempo.engine.patches import patches
from tempo.engine.placement import Decision
from tempo.engine.product import Product
from tempo.engine.sharing import Group, Parameters, Stash
from tempo.errors import ProtectionWarning
from tempo.schemes.base import Scheme
from tempo.wire.messages import Conv, Linear

if TYPE_CHECKING:
    from tempo.engine.engine import Engine

SETTLING = 4
"""Calls that are placed one by one before what was decided is taken for granted."""


@dataclass(eq=False)
class Usage:
    """What one site did, for `Session.summary`: forward FLOPs by place, and why the last call ran where it did."""

    offloaded: int = 0
    trusted: int = 0
    passing: int = 0
    """Of ``trusted``: what could not be sent as it was called, inside a trace say."""
    reason: str = "not called yet"


class Site:
    """One layer (or one projection of an attention layer) in a session.

    Args:
        engine: The session's engine.
        name: The layer's name in its model, for the user; never sent.
        scheme: What masks its products: a session may use one for each model.
        keep_trusted: Why every call stays in the trusted process, or None.
        channels_last: Whether feature maps that it gives out have channels last in memory, whatever it is given.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        scheme: Scheme,
        keep_trusted: str | None = None,
        channels_last: bool = False,
    ) -> None:
        self.engine = engine
        self.name = name
        self.scheme = scheme
        self.keep_trusted = keep_trusted
        self.channels_last = channels_last
        self.usage = Usage()
        self.group: Group | None = None
        self.neighbours: list[tuple[Site, Parameters]] = []
        self._products: dict[Linear | Conv, Product] = {}
        self._stash: Stash | None = None
        self._span_warned = False
        self.outputs = 0
        """Output features, once it was called."""
        self._cost = 0
        self._lasting = self._weighed = False
        self._settling = SETTLING
        self._alike: tuple[tuple[object, ...], int] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Site:
        """A copy of a layer is a layer of its own: same session, own labels, own masks."""
        return Site(self.engine, f"{self.name} (copy)", self.scheme, self.keep_trusted, self.channels_last)

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a site belongs to a running session and cannot be stored")

    @property
    def sites(self) -> list[Site]:
        """It, or what it consists of."""
        return [self]

    @property
    def trusted_updates(self) -> list[str]:
        """Why its weight is updated here although the session lets workers do that."""
        products = list(self._products.values()) if self.group is None else [self.group.product]
        return [product.trusted_updates for product in products if product.trusted_updates]

    def linear(self, x: Tensor, parameters: Parameters, trusted: Callable[[], Tensor]) -> Tensor:
        """A fully connected layer on ``x`` of shape (..., features); ``trusted`` computes the same here."""
        y = self._linear(x, parameters)
        return trusted() if y is None else y

    @of_our_own
    def _linear(self, x: Tensor, parameters: Parameters) -> Tensor | None:
        """The same by workers; None: here, so that plain PyTorch computes, or raises, what it does."""
        operands = parameters()
        weight = operands.weight
        if x.is_nested or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
            return None
        rows = x.numel() // max(1, x.shape[-1])
        shape = (rows, x.shape[-1])
        if not self._goes_out(Linear(), shape, x, weight):
            if self._weighed and self.group is None and self.engine.sharing.possible(x, weight):
                self.engine.sharing.noticed(self, x, parameters)  # together with its neighbours it may pay
            self._stay(x, weight)
            return None
        if self.engine.sharing.possible(x, weight):
            given = self._take_stashed(x, operands)
            if given is not None:
                return given
            if self.group is None:
                self.engine.sharing.noticed(self, x, parameters)
            if self.group is not None and (members := self.group.starting_with(self, operands)):
                return self.group.compute(members, x)
        (y,) = self.compute(self._product(Linear()), x, [operands])
        return y

    def convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, kind: Conv, trusted: Callable[[], Tensor]
    ) -> Tensor:
        """A convolution on ``x`` of shape (batch, channels, ...); ``trusted`` computes the same here."""
        y = self._convolution(x, weight, bias, kind)
        return trusted() if y is None else y

    @of_our_own
    def _convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, kind: Conv) -> Tensor | None:
        """The same by workers; None: here."""
        if self.stays(x, weight):
            return None
        unfolds = self.engine.settings.unfold or self.scheme.traits.unfolds
        pointwise = kind.groups == 1 and all(size == 1 for size in weight.shape[2:]) and not any(kind.padding)
        if unfolds and kind.groups == 1 and not pointwise:
            return self._unfolded(x, weight, bias, kind)
        if not self._goes_out(kind, tuple(x.shape), x, weight):
            self._stay(x, weight)
            return None
        if pointwise:
            return self._pointwise(x, weight, bias, kind)
        if broken := self.scheme.traits.known_breaks.get("spatial-convolution"):
            self.engine.warn_once(f"scheme {self.scheme.name!r}: {broken}", ProtectionWarning)
        self._warn_of_span(x)
        (y,) = offload(self._product(kind), x.to(compute_dtype(x, weight)), [Operands(weight, bias)])
        return y

    def _pointwise(self, x: Tensor, weight: Tensor, bias: Tensor | None, kind: Conv) -> Tensor:
        """A 1×1 convolution is a fully connected layer over pixels, so its rows get a full row mask."""
        kept = (slice(None), *(slice(None, None, step) for step in kind.stride))
        last = x.movedim(1, -1)  # picked as axes lie: so do those of the gradient that autograd fills up with zeros
        pixels = last[kept] if kind.channels_last else x[(slice(None), *kept)].movedim(1, -1)
        (y,) = self.compute(self._product(Linear()), pixels, [Operands(weight.flatten(1), bias)])
        return _as_maps(y, kind)

    def _unfolded(self, x: Tensor, weight: Tensor, bias: Tensor | None, kind: Conv) -> Tensor | None:
        """A convolution sent as its patches: rows and taps are masked too, for as many times the bytes as taps."""
        kernel, flat = tuple(weight.shape[2:]), weight.flatten(1)
        batch, _, *positions = output_shape(kind, tuple(x.shape), tuple(weight.shape))
        if not self._goes_out(Linear(), (batch * prod(positions), flat.shape[1]), x, flat):
            self._stay(x, weight)
            return None
        (y,) = self.compute(self._product(Linear()), patches(x, kind, kernel), [Operands(flat, bias)])
        return _as_maps(y, kind)

    def _warn_of_span(self, x: Tensor) -> None:
        """Masks mix whole maps: with fewer maps than pixels, an image is in their span only if it was in the batch."""
        maps, pixels = x.shape[0] * x.shape[1], prod(x.shape[2:])
        if maps < pixels and not self._span_warned:
            self._span_warned = True
            self.engine.warn_once(
                f"layer {self.name!r}: batch × channels is {maps}, below the {pixels} pixels of a map, so workers can "
                "tell whether a picture that they know is in the batch; raise the batch size, or keep the layer here "
                f"(trusted={self.name!r})",
                ProtectionWarning,
            )

    def compute(self, product: Product, x: Tensor, members: list[Operands]) -> list[Tensor]:
        """Send ``x`` of shape (..., features) out as rows."""
        flat = x.reshape(-1, x.shape[-1]).to(compute_dtype(x, members[0].weight))
        outputs = offload(product, flat, members)
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]

    def _goes_out(self, kind: Linear | Conv, shape: tuple[int, ...], x: Tensor, weight: Tensor) -> bool:
        """Place this call, and account for it."""
        dtype = compute_dtype(x, weight)
        self._cost = cost = flops(kind, shape, tuple(weight.shape))
        self.outputs = weight.shape[0]
        out_of_reach = None
        if self.keep_trusted is not None:
            decision = Decision(False, self.keep_trusted)
        elif cost == 0:
            decision = Decision(False, "empty")
        elif (out_of_reach := _out_of_reach(x, weight)) is None and residence_of(weight) is not None:
            decision = Decision(True, "offloaded; its weight lives on a worker")
        elif reason := out_of_reach or self.secret(weight) or self.scheme.refuses(kind, shape, tuple(weight.shape)):
            decision = Decision(False, reason)
        else:
            training = torch.is_grad_enabled()
            together = self.outputs if self.group is None else max(self.group.outputs, self.outputs)
            with self.engine.stats.timed("plan"):
                decision = self.engine.planner.decide(
                    self.scheme,
                    kind,
                    shape,
                    (together, *weight.shape[1:]),
                    dtype,
                    want_dx=training and x.requires_grad,
                    want_dw=training and weight.requires_grad,
                )
        if not decision.offload and (residence := residence_of(weight)) is not None:
            residence.recall()
        self._lasting, self._weighed = out_of_reach is None, decision.estimate is not None
        self.usage.reason = decision.reason
        if decision.offload:
            self.usage.offloaded += cost
        else:
            self.stayed(cost)
            self.usage.passing += 0 if out_of_reach is None else cost
        return decision.offload

    def secret(self, weight: Tensor) -> str | None:
        """Why ``weight`` must not be sent under a scheme that does not hide weights, or None."""
        if not self.scheme.traits.public_weights:
            return None
        if weight.requires_grad:
            return f"its weight is trained, and scheme {self.scheme.name!r} sends weights as they are"
        if not self.engine.public.holds(weight):
            return self.engine.public.why_not(weight)
        return None

    def computed(self, rows: int, weight: Tensor) -> None:
        """Account for a call on so many rows that was computed here, together with something else."""
        self.stayed(flops(Linear(), (rows, weight.shape[1]), tuple(weight.shape)))

    def stays(self, x: Tensor, weight: Tensor) -> bool:
        """Whether this call is like one that stayed here for good: a short cut, since layers may be tiny."""
        if self._alike is None or x.is_nested or self._alike[0] != _likeness(x, weight) or residence_of(weight):
            return False
        self.stayed(self._alike[1])
        return True

    def stayed(self, cost: int) -> None:
        """Account for so many FLOPs that were computed here."""
        self.usage.trusted += cost
        self.engine.stats.flops_trusted += cost

    def _stay(self, x: Tensor, weight: Tensor) -> None:
        """Let calls like this one stay here, if they would, and once neighbours have had the time to be found."""
        self._settling = max(0, self._settling - 1)
        if self._lasting and not self._settling:
            self._alike = _likeness(x, weight), self._cost

    def _product(self, kind: Linear | Conv) -> Product:
        if kind not in self._products:
            self._products[kind] = Product(self.engine, self.name, kind, self.scheme)
        return self._products[kind]

    def _take_stashed(self, x: Tensor, operands: Operands) -> Tensor | None:
        """The output that a neighbour's call already brought for this very input, if it still holds."""
        stash, self._stash = self._stash, None
        if stash is None or not stash.holds_for(x, operands):
            return None
        if self.group is not None:
            self.group.misses = 0
        return stash.y

    def stash(self, stash: Stash) -> None:
        """Keep the output of a group's call until this site is called."""
        self._stash = stash


def _likeness(x: Tensor, weight: Tensor) -> tuple[object, ...]:
    """What the placement of one site's call depends on."""
    return x.shape, x.dtype, x.requires_grad, weight.requires_grad, torch.is_grad_enabled()


def _as_maps(y: Tensor, kind: Conv) -> Tensor:
    """Rows of pixels as maps, in the order of axes in memory in which the convolution has to give them."""
    maps = y.movedim(-1, 1)
    return maps if kind.channels_last else maps.contiguous()


def _out_of_reach(x: Tensor, weight: Tensor) -> str | None:
    """Why a product of these cannot be sent, or None. Plain PyTorch then computes it here, or raises what it raises."""
    for tensor in (x, weight):
        if tensor.device.type != "cpu":
            return f"its tensors are on {tensor.device}; the trusted side of Tempo runs on the CPU"
        if tensor.layout != torch.strided or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return f"not dense tensors: {type(tensor).__name__} of layout {tensor.layout}"
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"input is {x.dtype}, weight {weight.dtype}"
    if compute_dtype(x, weight) not in WIRE_DTYPES:
        return f"{weight.dtype} is not a floating-point type that workers compute in"
    if (
        torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return "inside a trace, torch.func or forward-mode differentiation, which see PyTorch's own operations only"
    return None

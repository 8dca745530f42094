"""Offloaded products, and adapters beside them, as PyTorch's autograd sees them.

Two nodes per product. `_Offload` computes ``Y`` and, going back, sends ``G`` and returns ``dX`` as soon as it is there.
`_WeightGate` sits between the weight and `_Offload`; it awaits ``dW``, which nobody needs before the optimizer. The
engine runs ready nodes in descending order of their sequence numbers, so a gate numbered 0 runs after everything
else, and workers compute ``dW`` while the backward pass goes on. Since ``dW`` still travels through autograd, hooks,
`torch.autograd.grad`, DDP, tied and re-parametrised weights see nothing unusual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempo.engine.adapters import Adapters, Operands
from tempo.engine.call import Finish
from tempo.engine.product import Product
from tempo.schemes.low_rank import LowRank

F = TypeVar("F", bound=Callable[..., Any])


def of_our_own(function: F) -> F:
    """``function`` without function modes, which are for the model: ours would be asked about every operation of it,
    and `torch.device` would have masks made elsewhere.
    """

    @wraps(function)
    def run(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args)

    return cast(F, run)


class _Pending:
    """A weight gradient on its way: filled by `_Offload`, awaited by `_WeightGate`."""

    def __init__(self) -> None:
        self.await_gradient: Callable[[], Tensor] | None = None


class _WeightGate(torch.autograd.Function):
    """From a weight to an empty token whose gradient, when asked for, is ``dW``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, pending: _Pending) -> Tensor:
        ctx.pending = pending
        ctx.dtype = weight.dtype
        ctx.set_materialize_grads(False)
        return torch.empty(0, dtype=weight.dtype)  # asks nothing of a weight that is away

    @staticmethod
    @once_differentiable
    @of_our_own
    def backward(ctx: Any, token_gradient: Tensor | None) -> tuple[Tensor | None, None]:
        awaited, ctx.pending.await_gradient = ctx.pending.await_gradient, None
        if awaited is None or token_gradient is None:  # this weight's output went unused
            return None, None
        return awaited().to(ctx.dtype), None


class _Offload(torch.autograd.Function):
    """``Y_k = X W_kᵀ + b_k`` for every member ``k`` of a product, on workers, and what its adapter adds, from here."""

    @staticmethod
    def forward(
        ctx: Any,
        product: Product,
        members: Sequence[Operands],
        pending: Sequence[_Pending | None],
        x: Tensor,
        *differentiable: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights, of_members = [member.weight for member in members], [member.adapter for member in members]
        with torch._C._DisableAutocast():
            adapters = Adapters(of_members, x.dtype) if any(of_members) else None
            biases, keep = [member.bias for member in members], any(p is not None for p in pending)
            outputs, call = product.call(x, weights, biases, adapters, keep=keep)
        # Of a weight that lives on a worker there is nothing to save, and hooks would have to read it.
        saved = weights if call.residence is None else []
        factors = [factor for adapter in of_members if adapter for factor in (adapter.a, adapter.b)]
        ctx.save_for_backward(x, *saved, *factors)
        ctx.product, ctx.call, ctx.pending, ctx.adapters = product, call, pending, adapters
        ctx.shapes = [y.shape for y in outputs]
        ctx.dtypes = [None if t is None else t.dtype for t in differentiable]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    @of_our_own
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        members = len(gradients)
        needs_x, *needs = ctx.needs_input_grad[3:]
        # A member whose output went unused has no gradient at all, as in plain PyTorch: not one of zeros.
        needs_w, needs_bias, needs_a, needs_b = (
            [need and g is not None for need, g in zip(needs[first : first + members], gradients, strict=True)]
            for first in range(0, len(needs), members)
        )
        used = [g for g in gradients if g is not None]
        unpacked: list[tuple[Tensor, list[Tensor]]] = []

        def saved() -> tuple[Tensor, list[Tensor]]:
            if not unpacked:  # once at most: under `torch.utils.checkpoint` each time would recompute
                unpacked.append(_saved(ctx))
            return unpacked[0]

        finish: Finish | None = None
        if used and (needs_x or any(needs_w)):
            whole = [used[0].new_zeros(s) if g is None else g for g, s in zip(gradients, ctx.shapes, strict=True)]
            g = joined(whole)
            if any(needs_w) and not all(needs_w) and ctx.call.residence is not None:
                ctx.call.residence.end("only some of the outputs that it has with others are used")
            finish = ctx.call.begin_backward(g, saved, want_dx=needs_x, want_dw=any(needs_w))
        totals = _totals(ctx, gradients, needs_bias, None if finish is None else ctx.call.total)
        back: LowRank | None = None
        of_a: Sequence[Tensor | None] = [None] * members
        of_b: Sequence[Tensor | None] = [None] * members
        if ctx.adapters is not None and used:  # while workers compute
            back, of_a, of_b = ctx.adapters.differentiate(lambda: saved()[0], gradients, needs_x, needs_a, needs_b)
        dx = None
        if finish is not None:
            dx, weight_gradients = finish(back)
            if weight_gradients is not None:
                _hand_over(weight_gradients, ctx.pending)
        tokens = [
            g.new_zeros(0) if need and g is not None else None for g, need in zip(gradients, needs_w, strict=True)
        ]
        found, wanted = [*tokens, *totals, *of_a, *of_b], [*needs_w, *needs_bias, *needs_a, *needs_b]
        given = [
            g.to(dtype) if need and g is not None else None
            for g, need, dtype in zip(found, wanted, ctx.dtypes, strict=True)
        ]
        return None, None, None, dx, *given


def _saved(ctx: Any) -> tuple[Tensor, list[Tensor]]:
    """The input and the weights; raises as PyTorch does where they were changed since."""
    x, *others = ctx.saved_tensors
    resident = ctx.call.residence
    return x.detach(), others[: len(ctx.shapes)] if resident is None else list(resident.parameters)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Gradients as one, side by side: without a copy where they lie so, as those of `tempo.trusted.attention` do."""
    first, end = parts[0], parts[0].storage_offset()
    if len(parts) == 1:
        return first
    for part in parts:
        here = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.storage_offset() == end
        if not (here and part.dim() == 2 and part.stride() == first.stride() and part.stride(1) == 1):
            return torch.cat(list(parts), 1)
        end += part.shape[1]
    return first.as_strided((first.shape[0], end - first.storage_offset()), first.stride())


def _totals(
    ctx: Any, gradients: Sequence[Tensor | None], needed: Sequence[bool], total: Tensor | None
) -> Sequence[Tensor | None]:
    """The sum of each gradient's rows, of all of which ``total`` is if it is known already; warns of what is not
    finite.
    """
    product = ctx.product
    with product.engine.stats.timed("mask", "g", product.name):
        if total is not None:
            totals: Sequence[Tensor | None] = total.split_with_sizes([shape[1] for shape in ctx.shapes])
        else:
            # Exact schemes notice by themselves what is not finite, so that frozen biases need no sums.
            needless = product.scheme.traits.exact
            totals = [
                None if g is None or (needless and not need) else g.sum([0, *range(2, g.dim())])
                for g, need in zip(gradients, needed, strict=True)
            ]
        for g, of_rows in zip(gradients, totals, strict=True):
            if g is not None and of_rows is not None:
                product.engine.warn_if_not_finite(product.name, g, of_rows)
    return totals


def _hand_over(weight_gradients: Callable[[], list[Tensor]], pending: Sequence[_Pending | None]) -> None:
    """Give each member's gate its part of one answer, which the first gate to run awaits for all."""
    parts: list[Tensor] = []

    def part(index: int) -> Tensor:
        if not parts:
            parts.extend(weight_gradients())
        return parts[index]

    for index, gate in enumerate(pending):
        if gate is not None:
            gate.await_gradient = partial(part, index)


def offload(product: Product, x: Tensor, members: Sequence[Operands]) -> tuple[Tensor, ...]:
    """Compute a product on workers, and its members' adapters here, differentiably.

    Args:
        product: What to compute.
        x: Rows first, features second, in the compute dtype.
        members: Weights in their own dtype, biases and adapters.

    Returns:
        One output per member, in ``x``'s dtype.
    """
    tokens: list[Tensor | None] = []
    pending: list[_Pending | None] = []
    for weight, _, _ in members:
        if torch.is_grad_enabled() and weight.requires_grad:
            gate = _Pending()
            token = _WeightGate.apply(weight, gate)
            token.grad_fn._set_sequence_nr(0)
            pending.append(gate)
            tokens.append(token)
        else:
            pending.append(None)
            tokens.append(None)
    biases = [member.bias for member in members]
    a = [None if member.adapter is None else member.adapter.a for member in members]
    b = [None if member.adapter is None else member.adapter.b for member in members]
    outputs: tuple[Tensor, ...] = _Offload.apply(product, members, pending, x, *tokens, *biases, *a, *b)
    return outputs

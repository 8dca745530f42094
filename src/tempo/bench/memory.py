"""What a step cannot do without reading and writing on the trusted side, and how fast memory is.

Masks, checks and trusted layers do a few operations for every number that they read: beyond FLOPs, memory bounds them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from tempo.engine.away import residence_of
from tempo.engine.dtypes import answer_dtype, masked_dtype
from tempo.engine.site import Site
from tempo.engine.stats import Stats
from tempo.schemes.base import Traits

_SUMS: Final = {"add", "add_", "__add__", "__radd__", "__iadd__"}


class LayerBytes:
    """A context that counts what trusted layers without parts take and give, once forward and once backward; attention
    and sums, too, which are functions.

    Not counted: layers whose products went out, what gives out its input (dropout of nothing, a view), other functions.

    Attributes:
        total: Bytes so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks: list[RemovableHandle] = []
        self.total = 0

    def __enter__(self) -> Self:
        leaves = [module for module in self._model.modules() if not any(module.children())]
        functions = _Functions(self._count)

        def begin(*_: Any) -> None:
            functions.__enter__()

        # Entered within the model: the mode that a protected one runs in would take attention from one around it.
        self._hooks = [
            *(leaf.register_forward_hook(self._count_layer) for leaf in leaves),
            self._model.register_forward_pre_hook(begin),
            self._model.register_forward_hook(lambda *_: functions.__exit__(None, None, None)),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count_layer(self, module: nn.Module, given: Any, output: Any) -> None:
        site: Site | None = vars(module).get("_tempo")
        if site is None or not site.usage.offloaded:
            self._count(given, output)

    def _count(self, given: Any, output: Any) -> None:
        inputs, outputs = (
            [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (given, output)
        )
        if {t.data_ptr() for t in inputs} & {t.data_ptr() for t in outputs}:
            return
        self.total += sum((1 + t.requires_grad) * t.nbytes for t in (*inputs, *outputs))


class _Functions(TorchFunctionMode):
    """Tells ``count`` what attention and sums take and give."""

    def __init__(self, count: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention or func.__name__ in _SUMS:
            self._count((args, kwargs), result)
        return result


def travelling(used: Stats, wire_dtype: str, traits: Traits) -> dict[str, int]:
    """The least bytes that could have travelled for ``used``, by operand and answer: each once, computed in float32.

    Args:
        used: What a stretch of a session used.
        wire_dtype: As in the settings.
        traits: Of the scheme that masked it.
    """
    masked = torch.int32 if traits.exact else masked_dtype(wire_dtype, torch.float32)
    answers = answer_dtype(wire_dtype, masked)
    up, down = 1 if wire_dtype == "int8" else masked.itemsize, answers.itemsize
    return {name: count * (up if name in ("x", "w", "g") else down) for name, count in used.elements.items()}


def masking(used: Stats, wire_dtype: str, traits: Traits) -> int:
    """The least bytes that the trusted side read and wrote to mask and unmask: each operand once and its masked form,
    each answer (of each operator that has a share of it) and its result, in float32.
    """
    shares = traits.min_workers if traits.exact else 1
    wire = travelling(used, wire_dtype, traits)
    answered = sum(wire[name] for name in ("y", "dx", "dw"))
    return 4 * sum(used.elements.values()) + sum(wire.values()) + (shares - 1) * answered


def optimizing(model: nn.Module) -> int:
    """The least bytes that SGD with momentum reads (weight, gradient, momentum) and writes (weight, momentum) here."""
    return sum(5 * p.nbytes for p in model.parameters() if p.requires_grad and residence_of(p) is None)


def copy_speed(elements: int = 1 << 24, pairs: int = 8) -> float:
    """Bytes per second of copies of so many float32 numbers, read and written ones counted.

    Of several pairs of tensors in turn, as a step goes through its own: the caches of a server hold a pair or two.
    """
    sources = [torch.ones(elements) for _ in range(pairs)]
    targets = [torch.ones(elements) for _ in range(pairs)]  # not empty: their pages are there
    start = time.perf_counter()
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
    return pairs * 2 * sources[0].nbytes / (time.perf_counter() - start)

"""The audit of placement: every matrix product that the trusted process computed itself, with its FLOPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

from tempo.rendering import plain_text


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(g: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(g.shape, query.shape, key.shape, value.shape))


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # PyTorch's own table leaves out the attention that it runs on CPUs.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _ProductMode(TorchDispatchMode):
    """Tells ``record`` of every product that PyTorch dispatches, and its FLOPs."""

    def __init__(self, record: Callable[[str, int], None]) -> None:
        super().__init__()
        self._record = record

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and count it if it multiplies matrices."""
        count = _FORMULAS.get(func.overloadpacket)
        if count is None and torch.is_inference_mode_enabled():
            # Autograd, which is off here, would have taken `linear` and `matmul` apart.
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        result = func(*args, **(kwargs or {}))
        if count is not None:
            operation = str(func.overloadpacket).removeprefix("aten.")
            self._record(operation, int(count(*args, **(kwargs or {}), out_val=result)))
        return result


class TrustedProducts:
    """A context that records products as PyTorch dispatches them; workers' products never get that far.

    Products that masks and checks consist of are none of the model's, and not recorded.

    Printing it gives a table by module and operation. Backward passes are attributed to the module whose forward
    they belong to.
    """

    def __init__(self, model: nn.Module, timed: Sequence[str] = ()) -> None:
        """``timed`` is what `Stats` times at the moment, where a session protects ``model``."""
        self._timed = timed
        self._mode = _ProductMode(self._record)
        self._names = {module: name or type(model).__name__ for name, module in model.named_modules()}
        self._running = [type(model).__name__]
        self._origins: dict[int, str] = {}  # modules by the sequence numbers of their autograd nodes
        self._hooks: list[RemovableHandle] = []
        self.flops: Counter[tuple[str, str]] = Counter()
        """FLOPs by (module name, operation)."""

    @property
    def total(self) -> int:
        """All FLOPs recorded."""
        return sum(self.flops.values())

    def __enter__(self) -> Self:
        self._hooks = [
            register_module_forward_pre_hook(self._enters),
            register_module_forward_hook(self._leaves, always_call=True),
        ]
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()

    def _enters(self, module: nn.Module, _: Any) -> None:
        if module in self._names:
            self._running.append(self._names[module])

    def _leaves(self, module: nn.Module, *_: Any) -> None:
        if module in self._names:
            self._running.pop()

    def _record(self, operation: str, flops: int) -> None:
        if self._timed:
            return
        module = self._running[-1]
        node = torch._C._current_autograd_node()
        if node is None or torch.is_grad_enabled():  # forward, or forward again: in a recomputation
            self._origins.setdefault(torch._C._autograd._get_sequence_nr() - 1, module)
        else:
            module = self._origins.get(node._sequence_nr(), module)
        self.flops[module, operation] += flops

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("module", "operation", title="matrix products in the trusted process")
        table.add_column("MFLOPs", justify="right")
        for (module, operation), flops in self.flops.most_common():
            table.add_row(module, operation, f"{flops / 1e6:,.3f}")
        table.add_row("total", "", f"{self.total / 1e6:,.3f}", style="bold")
        yield table

    def __str__(self) -> str:
        return plain_text(self)

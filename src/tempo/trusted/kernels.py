"""When a native kernel may stand in for an operator of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tempo import kernels


def native_for(*tensors: Tensor) -> ModuleType | None:
    """The native kernels if they can take ``tensors``: float32, dense and on the CPU; None: leave it to PyTorch.

    Whoever watches PyTorch's operators (a compiler, a trace, `torch.func`, a dispatch mode, autocast) sees PyTorch's.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    for tensor in tensors:
        if (
            type(tensor) not in (Tensor, nn.Parameter)
            or tensor.dtype != torch.float32
            or tensor.device.type != "cpu"
            or tensor.layout != torch.strided
            or not tensor.numel()
        ):
            return None
    return kernels.native()


def differentiated(
    function: Callable[..., Tensor], operands: Sequence[Tensor], needs: Sequence[bool], g: Tensor
) -> list[Tensor | None]:
    """Gradients of ``function`` by PyTorch for operands that ``needs`` says; can be differentiated if grad is on."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # As if they did not depend on each other.
        operands = [t.view_as(t) for t in operands]
        needed = [t for t, need in zip(operands, needs, strict=True) if need]
        found = iter(torch.autograd.grad(function(*operands), needed, g, create_graph=again))
    return [next(found) if need else None for need in needs]


def recomputes() -> bool:
    """Whether hooks on saved tensors are at work: recomputation compares what two passes saved."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def hooked(module: nn.Module) -> bool:
    """Whether somebody wants to be told when ``module`` is called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(map(bool, hooks)) or nn.modules.module._has_any_global_hook()

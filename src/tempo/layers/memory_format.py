"""Feature maps with channels last in memory: norms, activations and masks are faster there.

Plain PyTorch has them so once a model is given that memory format. A protected model gets them so by itself, where
that cannot be noticed: no code of its own may ask for a view, which PyTorch refuses of maps in that order, and maps
that leave the model are put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from types import CodeType, FunctionType
from typing import Any, Final

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tempo.wire.layout import is_last

_ASKS: Final = {"view", "view_as", "as_strided"}
"""Methods of tensors that depend on the order of axes in memory."""


def unaware(model: nn.Module) -> bool:
    """Whether the model has convolutions over two or three axes, and nothing that would notice channels last."""
    if not any(isinstance(module, nn.Conv2d | nn.Conv3d) for module in model.modules()):
        return False
    classes = {type(module) for module in model.modules()}
    return not any(_ASKS.intersection(code.co_names) for cls in classes for code in _reached(cls))


def restored(output: Any) -> Any:
    """What a model gives out, with maps in the order of axes that plain PyTorch gives them."""
    if any(isinstance(leaf, Tensor) and is_last(leaf) for leaf in pytree.tree_leaves(output)):
        return pytree.tree_map_only(Tensor, Tensor.contiguous, output)
    return output


def _reached(cls: type[nn.Module]) -> Iterator[CodeType]:
    """The code that ``forward`` may run, as far as names tell, without PyTorch's own."""
    seen: set[Any] = set()
    found: list[Any] = [getattr(cls, "forward", None)]
    while found:
        function = found.pop()
        function = getattr(function, "__func__", function)
        if not isinstance(function, FunctionType) or function in seen or function.__module__.startswith("torch."):
            continue
        seen.add(function)
        with suppress(ValueError):  # a cell that is still empty
            found += [cell.cell_contents for cell in function.__closure__ or ()]
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            yield code
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
            found += [function.__globals__.get(name) for name in code.co_names]
            found += [vars(base).get(name) for base in cls.__mro__ for name in code.co_names if name != "forward"]

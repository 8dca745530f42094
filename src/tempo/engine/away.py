"""Parameters whose values live on a worker: here they can be passed on, and raise when they are read.

The class of the parameter is swapped, as PyTorch does to make an `UninitializedParameter` an ordinary one; so it stays
the object that optimizers and modules know. Its memory is let go of: what a reader that went round Python would find is
NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tempo.errors import WeightAwayError

if TYPE_CHECKING:
    from tempo.engine.residence import Residence

_ATTRIBUTES = (
    "shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "ndim", "itemsize", "nbytes", "names",
    "_version", "is_cpu", "is_cuda", "is_sparse", "is_sparse_csr", "is_quantized", "is_meta", "is_nested", "is_mkldnn",
    "is_mps", "is_xpu", "is_xla", "is_mtia", "is_vulkan", "is_ipu", "is_maia", "output_nr", "volatile", "retains_grad",
    "_backward_hooks",
)  # fmt: skip
_METHODS = (
    "dim", "size", "numel", "nelement", "ndimension", "is_inference", "element_size", "is_floating_point", "is_complex",
    "is_signed", "get_device", "stride", "is_contiguous", "is_same_size", "requires_grad_", "__len__",
    "__hash__", "has_names", "storage_offset",
)  # fmt: skip


def _harmless() -> set[Callable[..., Any]]:
    """What tells nothing of a tensor's values."""
    found: set[Callable[..., Any]] = {getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)}
    found |= {getattr(Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(Tensor, name)}
    return found


_HARMLESS = _harmless()


class AwayParameter(nn.Parameter):
    """A parameter whose values are on a worker; see `put_away`."""

    _residence: Residence

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let pass what needs no values; refuse the rest."""
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        parameter = next((a for a in _flat(args, kwargs) if isinstance(a, AwayParameter)), None)
        raise WeightAwayError(_why(parameter, func))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Parameter of shape {tuple(self.shape)}, whose values are on worker {self._residence.where}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise WeightAwayError(_why(self, "copy.deepcopy"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise WeightAwayError(_why(self, "pickling"))


def put_away(parameter: nn.Parameter, residence: Residence) -> None:
    """From now on ``parameter`` stands for values that ``residence`` keeps on a worker; its gradient is dropped."""
    parameter.grad = None
    parameter.data = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
    parameter.__class__ = AwayParameter
    parameter._residence = residence  # type: ignore[attr-defined]


def bring_back(parameter: Tensor, values: Tensor) -> None:
    """Give ``parameter`` values again, and its own class."""
    parameter.__class__ = nn.Parameter
    del parameter._residence  # type: ignore[attr-defined]
    parameter.data = values


def residence_of(parameter: Tensor) -> Residence | None:
    """Where the values of ``parameter`` are, if not here."""
    return parameter._residence if isinstance(parameter, AwayParameter) else None


def follow_state(module: nn.Module) -> list[RemovableHandle]:
    """Have ``module.state_dict()`` and ``load_state_dict()`` see weights that are here."""

    def recall(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if (residence := residence_of(parameter)) is not None:
                residence.recall()

    def make_way(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if (residence := residence_of(parameter)) is not None:
                if residence.lost is None:
                    residence.recall()
                else:
                    residence.abandon()

    return [module.register_state_dict_pre_hook(recall), module.register_load_state_dict_pre_hook(make_way)]


def _flat(args: Any, kwargs: Any) -> list[Any]:
    flat, _ = torch.utils._pytree.tree_flatten((args, kwargs))
    return flat


def _why(parameter: AwayParameter | None, func: Any) -> str:
    name = func if isinstance(func, str) else getattr(func, "__name__", str(func))
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    residence = None if parameter is None else parameter._residence
    where = "" if residence is None else f"layer {residence.name!r}: "
    if owner == "grad":
        return (
            f"{where}the gradient of its weight is on a worker (update='worker'): step, zero_grad and state_dict "
            "of the optimizer that session.optimizer() gave work; to clip use session.clip_grad_norm_(), and for the "
            "gradient itself call session.fetch_weights() first"
        )
    return (
        f"{where}its weight is on a worker (update='worker'), so {owner or name} would read a stale one: use "
        "model.state_dict(), or call session.fetch_weights() first"
    )

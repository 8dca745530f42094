"""The attacker's own copy of a network, with products answered from elsewhere: runs the trusted part alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tempo.audit.attack import NotApplicable

Place = tuple[str, str]
"""A product's input, ``("x", name)``, or its output, ``("y", name)``."""


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """The product that a replay was to run to."""


class Skeleton:
    """A network whose products give what they are told to.

    Args:
        model: Of the victim's architecture; becomes float64, in training mode but for dropout.
        names: The products' modules, in the order of their execution.
        inputs: Samples of the right shape.

    Attributes:
        inputs_of: What goes into each product instead of what the network computes, by name; in place, so that
            whatever skips the product gets it too.
        outputs_of: What each product answers, before its bias, in the layout in which it travels.
    """

    def __init__(self, model: nn.Module, names: list[str], inputs: Tensor) -> None:
        self.model = model.double().train()
        self.modules: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        self.samples = inputs.double()
        self.inputs_of: dict[str, Tensor] = {}
        self.outputs_of: dict[str, Tensor] = {}
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()

    def run(self, rows: int, until: str | None = None) -> tuple[dict[str, Tensor], Any]:
        """Every product's input as it would travel, up to ``until``; and the network's output if there is no such."""
        seen: dict[str, Tensor] = {}

        def answer(name: str, module: Any, x: Tensor) -> Tensor:
            seen[name] = as_rows(module, x) if is_pixels(module) else _flat(module, x)
            if name == until:
                raise _Reached
            seen[name] = seen[name].clone()
            if name in self.inputs_of and not is_pixels(module):
                x.copy_(self.inputs_of[name].reshape(x.shape))
            if name in self.outputs_of:
                y = _as_module(module, x, self.outputs_of[name])
            else:
                computed: Tensor = type(module).forward(module, x)
                return computed
            return y if module.bias is None else y + along(module.bias, y, 1 if y.dim() == 4 else y.dim() - 1)

        for name, module in self.modules.items():
            module.forward = lambda x, name=name, module=module: answer(name, module, x)
        repeats = -(-rows // len(self.samples))
        samples = self.samples.repeat(repeats, *[1] * (self.samples.dim() - 1))[:rows]
        try:
            return seen, self.model(samples.clone())
        except _Reached:
            return seen, None
        finally:
            for module in self.modules.values():
                del module.forward

    def links(self) -> dict[str, set[Place]]:
        """Which inputs and outputs of earlier products each product's input depends on, through trusted functions.

        Raises:
            NotApplicable: A trusted function mixes channels, so that no permutation carries through it.
        """
        rows = 4
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self._answer_all(rows)
            before, _ = self.run(rows)
            self.inputs_of = dict(before)  # so that only direct ways count
            found: dict[str, set[Place]] = {name: set() for name in self.modules}
            for name in self.modules:
                for kind, tensors, source in (("x", self.inputs_of, before), ("y", self.outputs_of, self.outputs_of)):
                    plain = source[name]
                    noise = torch.randn(plain[:, 0].shape, generator=generator, dtype=plain.dtype)
                    changed = plain.clone()
                    changed[:, 0] += 10 * (1 + float(plain.abs().max())) * noise
                    tensors[name] = changed
                    after, _ = self.run(rows)
                    tensors[name] = plain
                    for other in list(self.modules)[list(self.modules).index(name) + 1 :]:
                        moved = (after[other] - before[other]).movedim(1, 0).flatten(1).abs().amax(1) > 1e-9
                        if bool(moved[1:].any()):
                            raise NotApplicable(
                                f"trusted functions between {name} and {other} mix channels (attention, LayerNorm)"
                            )
                        if bool(moved[0]):
                            found[other].add((kind, name))
            self.inputs_of, self.outputs_of = {}, {}
        return found

    def _answer_all(self, rows: int) -> None:
        """Have every product answer what the network's own weights give."""
        for name, module in self.modules.items():
            seen, _ = self.run(rows, until=name)
            x = seen[name]
            weight = module.weight
            if isinstance(module, nn.Conv2d) and not is_pixels(module):
                y = nn.functional.conv2d(x, weight, None, module.stride, module.padding, module.dilation, module.groups)
            else:
                y = x @ weight.flatten(1).T
            self.outputs_of[name] = y


def is_pixels(module: nn.Module) -> bool:
    """Whether a convolution goes out as a product of pixels: 1×1, without padding or groups."""
    return isinstance(module, nn.Conv2d) and all(
        (size, padding) == (1, 0) for size, padding in zip(module.kernel_size, module.padding, strict=True)
    ) and module.groups == 1  # fmt: skip


def as_rows(module: Any, x: Tensor) -> Tensor:
    """The pixels that a 1×1 convolution sees of N×C×H×W, as rows."""
    down, right = module.stride
    return x[:, :, ::down, ::right].movedim(1, -1).flatten(0, -2)


def along(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    """``scale`` shaped to multiply ``x`` along ``axis``."""
    return scale.view(-1, *[1] * (x.dim() - 1 - axis))


def _flat(module: nn.Module, x: Tensor) -> Tensor:
    return x if isinstance(module, nn.Conv2d) else x.flatten(0, -2)


def _as_module(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """An output as it travels, in the layout in which the module gives it."""
    if is_pixels(module):
        height, width = (-(-size // step) for size, step in zip(x.shape[2:], module.stride, strict=True))
        return y.reshape(len(x), height, width, -1).movedim(-1, 1)
    return y if isinstance(module, nn.Conv2d) else y.reshape(*x.shape[:-1], -1)

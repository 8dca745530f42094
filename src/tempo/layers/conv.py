"""`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempo.layers.base import Protected
from tempo.wire.layout import is_last
from tempo.wire.messages import Conv


class _ProtectedConv(Protected):
    """Overrides ``_conv_forward``, so that subclasses which pad in ``forward`` keep working."""

    @torch.compiler.disable
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        module: nn.Conv2d = self  # type: ignore[assignment]
        plain = super()._conv_forward  # type: ignore[misc]
        dims = len(module.kernel_size)
        batched = input if input.dim() == dims + 2 else input.unsqueeze(0)
        if batched.dim() != dims + 2 or batched.shape[1] != module.in_channels:
            return plain(input, weight, bias)  # type: ignore[no-any-return] # raises what plain PyTorch raises
        padded, padding = _resolve_padding(module, batched)
        if any(
            size + 2 * pad < dilation * (kernel - 1) + 1
            for size, pad, dilation, kernel in zip(
                padded.shape[2:], padding, module.dilation, module.kernel_size, strict=True
            )
        ):
            return plain(input, weight, bias)  # type: ignore[no-any-return]
        last = dims > 1 and (self._tempo.channels_last or is_last(batched) or is_last(weight))
        kind = Conv(tuple(module.stride), padding, tuple(module.dilation), module.groups, last)
        y: Tensor = self._tempo.convolution(
            padded, weight, bias, kind, lambda: plain(_channels_last(batched) if last else batched, weight, bias)
        )
        return y if batched is input else y.squeeze(0)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def _resolve_padding(module: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Padding as a worker understands it: zeros, equal on both sides; whatever else is applied to ``x`` here."""
    if module.padding_mode != "zeros":
        return F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), (0,) * (x.dim() - 2)
    if module.padding == "valid":
        return x, (0,) * (x.dim() - 2)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(total % 2 for total in totals):
            uneven = [side for total in reversed(totals) for side in (0, total % 2)]
            x = F.pad(x, uneven)
        return x, tuple(total // 2 for total in totals)
    return x, tuple(module.padding)  # type: ignore[arg-type]


class ProtectedConv1d(_ProtectedConv, nn.Conv1d):
    """A convolution over one axis whose product is computed under masks."""


class ProtectedConv2d(_ProtectedConv, nn.Conv2d):
    """A convolution over two axes whose product is computed under masks."""


class ProtectedConv3d(_ProtectedConv, nn.Conv3d):
    """A convolution over three axes whose product is computed under masks."""

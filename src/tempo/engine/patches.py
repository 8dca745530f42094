"""A convolution as a fully connected layer over patches: every tap of the kernel becomes a feature like any other."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from tempo.wire.messages import Conv


def patches(x: Tensor, kind: Conv, kernel: tuple[int, ...]) -> Tensor:
    """The patches of ``x`` that an ungrouped convolution multiplies by its weight, flattened.

    Args:
        x: N×C×spatial.
        kind: The convolution; zeros pad.
        kernel: Its sizes.

    Returns:
        N × output positions × C·taps, features in the order of ``weight.flatten(1)``; differentiable.
    """
    axes = len(kernel)
    x = F.pad(x, [side for padding in reversed(kind.padding) for side in (padding, padding)])
    for axis, (size, stride, dilation) in enumerate(zip(kernel, kind.stride, kind.dilation, strict=True)):
        # A window over the reach of the dilated kernel, of which the taps are every so many elements.
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x.movedim(1, 1 + axes).flatten(1 + axes)

"""Shield rows: random rows that fill up a part with fewer rows than a block, and what they add to ``dW``.

They are rows like any other to the worker. Their outputs and input gradients are dropped; their share of the weight
gradient, ``G_shieldᵀ X_shield``, is computed here and subtracted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tempo.keys import Keystream
from tempo.schemes import haar
from tempo.wire.messages import Conv, Product

_FAINT = 1e-20
"""Scale of shield rows beside rows that are all zero: not zero, and lost in any optimizer's epsilon."""


def shield_rows(stream: Keystream, like: Tensor, count: int) -> Tensor:
    """``count`` Gaussian rows, of ``like``'s shape otherwise, and of its root mean square."""
    scale = float(like.double().square().mean().sqrt()) or _FAINT
    values = haar.gaussians(stream, count * like[0].numel()) * scale
    return values.view(count, *like.shape[1:]).to(like.dtype)


def weight_gradient(product: Product, x: Tensor, g: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``dW`` of these rows alone, in at least float32."""
    work = torch.promote_types(x.dtype, torch.float32)
    x, g = x.to(work), g.to(work)
    if not isinstance(product, Conv):
        return g.t() @ x
    shape_only = x.new_empty(1).expand(shape)
    no_padding = [0] * len(product.stride)
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        g,
        x,
        shape_only,
        None,
        product.stride,
        product.padding,
        product.dilation,
        False,
        no_padding,
        product.groups,
        [False, True, False],
    )
    return gradients[1]

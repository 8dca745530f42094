"""One product in the common basis of a network that is being put together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tempo.audit.solvers.skeleton import along
from tempo.audit.transcript import Call


@dataclass
class Placed:
    """One product in the basis.

    Masked rows are taken in the order ``rows``; basis channel ``i`` is masked channel ``inputs[i]`` or ``outputs[i]``.
    ``x = x~[rows][:, inputs] / (v κ)`` and ``y = y~[rows][:, outputs] / (v p)``, scales by basis row and channel.
    """

    call: Call
    rows: Tensor
    inputs: Tensor
    log_v: Tensor
    log_kappa: Tensor
    outputs: Tensor | None = None
    log_p: Tensor = field(default_factory=lambda: torch.zeros(0))
    loose: bool = False
    """Whether ``v`` is a guess, still to be fitted."""

    residual: float = 0.0
    """Relative error of the replayed input, once fitted."""

    def x(self) -> Tensor:
        """``X`` in the basis."""
        x = self.raw_x()
        return x / (along(self.log_v.exp(), x, 0) * along(self.log_kappa.exp(), x, 1))

    def raw_x(self) -> Tensor:
        """``x~`` in the basis, but for scales."""
        return self.call.x.double()[self.rows][:, self.inputs]

    def y(self) -> Tensor:
        """``Y`` in the basis; zero where its channels are not placed yet."""
        y = self.raw_y()
        if self.outputs is None:
            return torch.zeros_like(y)
        return y[:, self.outputs] / (along(self.log_v.exp(), y, 0) * along(self.log_p.exp(), y, 1))

    def raw_y(self) -> Tensor:
        """``y~`` with its rows in order."""
        assert self.call.y is not None  # noqa: S101 - of a forward pass
        return self.call.y.double()[self.rows]

    def g(self) -> Tensor | None:
        """``G`` in the basis."""
        if self.call.g is None or self.outputs is None:
            return None
        g = self.call.g.double()[self.rows][:, self.outputs]
        return g * (along(self.log_v.exp(), g, 0) * along(self.log_p.exp(), g, 1))

    def raw_dx(self) -> Tensor | None:
        """``dx~`` in the basis, but for scales."""
        return None if self.call.dx is None else self.call.dx.double()[self.rows][:, self.inputs]

    def w(self) -> Tensor:
        """``W`` in the basis, output features first."""
        assert self.outputs is not None  # noqa: S101 - all is placed before weights are asked for
        w = self.call.w.double()[self.outputs][:, self.inputs]
        return w * along(self.log_kappa.exp(), w, 1) / along(self.log_p.exp(), w, 0)


def fit_scales(placed: Placed, replayed: Tensor) -> None:
    """``v`` and ``κ`` by least squares in turn, so that ``x~`` in order is ``v κ replayed``."""
    x = placed.raw_x()
    v, kappa = torch.ones(x.shape[0]).double(), torch.ones(x.shape[1]).double()
    for _ in range(10):
        for axis in (0, 1):
            others = [i for i in range(x.dim()) if i != axis]
            other = replayed * along((kappa, v)[axis], x, 1 - axis)
            # Rows in units of their own size, lest the largest decide.
            weight = 1 / along(v, x, 0).square()
            scale = (x * other * weight).sum(others) / (other.square() * weight).sum(others).clamp_min(1e-300)
            usable = torch.isfinite(scale) & (scale > 0)
            if axis == 0:
                v = torch.where(usable, scale, v)
            else:
                kappa = torch.where(usable, scale, kappa)
    placed.log_v, placed.log_kappa = v.log(), kappa.log()


def log_size(x: Tensor, axis: int) -> Tensor:
    """Logarithms of root mean squares along ``axis``; 0 where all is zero."""
    size = x.square().mean([i for i in range(x.dim()) if i != axis]).sqrt()
    return torch.where(size > 0, size, 1.0).log()


def evenly(x: Tensor) -> Tensor:
    """Weights by which channels count by how often, not how strongly, they are active."""
    axes = [i for i in range(x.dim()) if i != 1]
    size = (x.square().sum(axes, keepdim=True) / (x != 0).double().sum(axes, keepdim=True).clamp_min(1)).sqrt()
    return torch.where(size > 0, 1 / size.clamp_min(1e-300), 0.0)

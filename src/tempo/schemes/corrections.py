"""What covering an operand added to the answers, so that it can be taken off: the formulas of `tempo.schemes.cover`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from tempo.schemes.arithmetic import output, subtract_input_gradient, weight_gradient
from tempo.schemes.cover import Cover
from tempo.wire.messages import Conv, Product


@dataclass(frozen=True)
class Share:
    """What the filled columns of one group add to an answer: values times weights, at some features of it."""

    product: Product
    features: slice
    values: Tensor
    w: Tensor

    def take_off_output(self, y: Tensor) -> None:
        """``Y -= R Wᵀ``, in place."""
        y[:, self.features] -= output(self.product, self.values, self.w)

    def take_off_input_gradient(self, dx: Tensor) -> None:
        """``dX -= Q W``, in place."""
        subtract_input_gradient(self.product, self.values, self.w, dx[:, self.features])


def shares_of_output(product: Product, x: Tensor, columns: Tensor, w: Callable[[], Tensor]) -> list[Share]:
    """Of the filled ``columns`` of ``x``."""
    if not len(columns):
        return []
    weight, found = w(), []
    for group, local in _by_group(product, columns, x.shape[1]):
        features = _slice(group, len(weight) // _groups(product))
        values = x.index_select(1, local + group * weight.shape[1])
        found.append(Share(_alone(product), features, values, weight[features].index_select(1, local)))
    return found


def shares_of_input_gradient(product: Product, g: Tensor, columns: Tensor, w: Callable[[], Tensor]) -> list[Share]:
    """Of the filled ``columns`` of ``g``."""
    if not len(columns):
        return []
    weight, found = w(), []
    for group, local in _by_group(product, columns, g.shape[1]):
        which = local + group * (len(weight) // _groups(product))
        features = _slice(group, weight.shape[1])
        found.append(Share(_alone(product), features, g.index_select(1, which), weight.index_select(0, which)))
    return found


class WeightGradient:
    """What to take off ``dW``: filled rows, subtracted; dead columns, set to what they are.

    Args:
        product: What is computed.
        shape: Of the weight.
    """

    def __init__(self, product: Product, shape: tuple[int, ...]) -> None:
        self._product = product
        self._shape = shape
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._columns: list[tuple[Cover, Cover]] = []
        self._exact: list[tuple[Tensor | slice, Tensor | slice, Tensor]] = []

    @property
    def zero(self) -> bool:
        """Whether nothing but cover met in any part."""
        return bool(self._columns) and all(x.empty or g.empty for x, g in self._columns)

    @property
    def needed(self) -> bool:
        """Whether there is anything to do."""
        return self.zero or bool(self._rows or self._exact)

    def add(self, x: Cover, g: Cover, g_covered: Tensor, plain_x: Callable[[], Tensor]) -> None:
        """Note one worker's part: the covers of its ``X`` and ``G``, that ``G`` itself, and its plain ``X``."""
        self._columns.append((x, g))
        if x.needless and g.needless:
            return
        rows = torch.unique(torch.cat([x.rows, g.rows]))
        if len(rows) + len(x.shield) == 0:
            return
        x_rows = x.filled
        if len(rows) > len(x.rows):
            x_rows = plain_x().index_select(0, rows)
            x_rows[torch.searchsorted(rows, x.rows)] = x.filled[: len(x.rows)]
            x_rows = torch.cat([x_rows, x.shield])
        appended = torch.arange(x.real, x.real + len(x.shield))
        self._rows.append((x_rows, g_covered.index_select(0, torch.cat([rows, appended]))))

    def complete(self, g: Tensor, plain_x: Callable[[], Tensor]) -> None:
        """When all parts are known: columns dead in all of them have no gradient; others are computed here."""
        if all(cover.needless for pair in self._columns for cover in pair):
            return
        product, groups = self._product, _groups(self._product)
        inputs, outputs = self._shape[1], self._shape[0] // groups
        everywhere, partly = _dead_in_parts([x for x, _ in self._columns], inputs * groups)
        for group, local in _by_group(product, everywhere, inputs * groups):
            self._exact.append((_slice(group, outputs), local, torch.zeros(())))
        for group, local in _by_group(product, partly, inputs * groups):
            x_part, g_part = plain_x().index_select(1, local + group * inputs), g[:, _slice(group, outputs)]
            shape = (outputs, len(local), *self._shape[2:])
            exact = weight_gradient(_alone(product), x_part, g_part, shape)
            self._exact.append((_slice(group, outputs), local, exact))
        everywhere, partly = _dead_in_parts([g for _, g in self._columns], outputs * groups)
        if len(everywhere):
            self._exact.append((everywhere, slice(None), torch.zeros(())))
        for group, local in _by_group(product, partly, outputs * groups):
            which = local + group * outputs
            x_part, g_part = plain_x()[:, _slice(group, inputs)], g.index_select(1, which)
            exact = weight_gradient(_alone(product), x_part, g_part, (len(local), *self._shape[1:]))
            self._exact.append((which, slice(None), exact))

    def take_off(self, dw: Tensor) -> None:
        """In place."""
        if self.zero:
            dw.zero_()
            return
        for x, g in self._rows:
            dw -= weight_gradient(self._product, x, g, self._shape)
        for outputs, inputs, values in self._exact:
            dw[outputs, inputs] = values.to(dw.dtype)


def _dead_in_parts(covers: Sequence[Cover], width: int) -> tuple[Tensor, Tensor]:
    """Columns dead in all parts, and others that were filled in some. A part of zeros is dead throughout."""
    filled = torch.zeros(width, dtype=torch.bool)
    everywhere = torch.ones(width, dtype=torch.bool)
    for found in covers:
        if not found.empty:
            here = torch.zeros(width, dtype=torch.bool)
            here[found.columns] = True
            filled[found.filled_columns] = True
            everywhere &= here
    return everywhere.nonzero().squeeze(1), (filled & ~everywhere).nonzero().squeeze(1)


def _groups(product: Product) -> int:
    return product.groups if isinstance(product, Conv) else 1


def _alone(product: Product) -> Product:
    """The product within one group."""
    return msgspec.structs.replace(product, groups=1) if isinstance(product, Conv) else product


def _slice(group: int, width: int) -> slice:
    return slice(group * width, (group + 1) * width)


def _by_group(product: Product, columns: Tensor, total: int) -> Iterator[tuple[int, Tensor]]:
    """Groups that have some of ``columns``, out of ``total``, and which of theirs they are."""
    width = total // _groups(product)
    for group in torch.unique(columns // width).tolist():
        yield group, columns[columns // width == group] - group * width

"""Whether a weight changed since it was last masked (docs/decisions/0007)."""

from __future__ import annotations

import torch
from torch import Tensor

_PROBES: dict[tuple[int, torch.dtype], Tensor] = {}
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


class Fingerprint:
    """Tells whether a weight may have changed since it was last masked.

    Version counters miss writes through ``.data``, so contents are compared as well: a product with a fixed vector
    (notices anything moved) and the exact sum of the bit patterns (notices any single change). A false alarm only
    costs a fresh mask.
    """

    def __init__(self, w: Tensor) -> None:
        w = w.detach()
        flat = w.reshape(w.shape[0], -1)
        key = (flat.shape[1], w.dtype)
        # Half precisions would round away what moved.
        dtype = torch.promote_types(w.dtype, torch.float32)
        if key not in _PROBES:
            _PROBES[key] = torch.linspace(1, 2, flat.shape[1], dtype=torch.float64).sin().to(dtype)
        self._facts = (-1 if w.is_inference() else w._version, tuple(w.shape), w.dtype)
        self._moved = torch.mv(flat.to(dtype), _PROBES[key])
        self._sum = _sum_of_bits(flat)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Fingerprint)
            and self._facts == other._facts
            and self._sum == other._sum
            and torch.equal(self._moved, other._moved)
        )

    @property
    def finite(self) -> bool:
        """Whether that product shows that there is neither NaN nor infinity; large numbers may overflow in it."""
        return bool(torch.isfinite(self._moved).all())

    __hash__ = None  # type: ignore[assignment]


def _sum_of_bits(flat: Tensor) -> int:
    """The bit patterns of a matrix, summed as integers modulo 2^64; four times as fast in words of eight bytes."""
    rows = flat if flat.is_contiguous() else flat.t()
    if rows.is_contiguous() and (rows.shape[1] * rows.element_size()) % 8 == 0:
        return int(rows.view(torch.int64).sum())
    return int(flat.view(_BITS[flat.element_size()]).sum())

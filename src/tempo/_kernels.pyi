# What `native/module.cpp` provides. Arguments that do not fit raise ValueError or TypeError.

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

class Mask:
    """Gathers (int32), scales (float64), for every round its batches of blocks (float32), and those of inverses."""

    def __init__(
        self,
        gathers: Sequence[Tensor],
        scale: Tensor | None,
        blocks: Sequence[Sequence[Tensor]],
        inverses: Sequence[Sequence[Tensor]],
    ) -> None: ...

_Form = tuple[Mask, int]
"""Its number as `tempo.schemes.masks.Form` has it."""

def supported() -> list[str]: ...
def selected() -> str: ...
def select(name: str) -> None: ...
def sandwich(
    x: Tensor,
    rows: _Form | None,
    columns: _Form | None,
    outs: Sequence[Tensor],
    axis: int,
    biases: Sequence[Tensor | None],
    watch: tuple[Tensor, Tensor, Tensor] | None = None,
    plus: tuple[Tensor, Tensor] | None = None,
    tally: tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None] | None = None,
) -> tuple[bool, bool] | None: ...

# Random words (int64) become a permutation, or integers from ``low`` on, in place; False: others have to be drawn.
def permutation(words: NDArray[np.int64]) -> bool: ...
def integers(words: NDArray[np.int64], low: int, count: int) -> bool: ...
def gaussians(numbers: Tensor) -> None: ...
def orthogonal(gaussians: Tensor, q: Tensor) -> None: ...
def sums(
    x: Tensor,
    copy: Tensor | None,
    v: Tensor,
    of_rows: Tensor,
    row_lengths: Tensor,
    q: Tensor | None = None,
    of_columns: Tensor | None = None,
    column_lengths: Tensor | None = None,
) -> None: ...

# Ratio, place, residual and tolerance of the worst row, and how many could not be checked.
def compare(
    found: Tensor,
    expected: Tensor,
    lengths: Tensor,
    other: Tensor,
    answers: Tensor,
    error: tuple[float, float, float, float],
    drift: float,
    threshold: float,
    limit: float,
) -> tuple[float, int, float, float, int]: ...

# Of a convolution with few channels; the length of all that its kernel covers.
def taps(
    x: Tensor,
    kernel: Tensor,
    sums: Tensor,
    lengths: Tensor,
    covered: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    back: bool,
) -> float: ...

# Products of a tall matrix with a few vectors on either side.
def tall_products(
    x: Tensor, v: Tensor | None, of_rows: Tensor | None, q: Tensor | None, of_columns: Tensor | None
) -> None: ...

# The upper triangle of ``projected`` (steps, steps; float64), from ``w`` (float32, rows contiguous), ``z`` of length 1.
def lanczos(w: Tensor, z: Tensor, projected: Tensor) -> None: ...

# Patches (images, outputs, channels · taps) of maps (images, inputs, channels), and added to maps again;
# ``met`` (outputs, taps; int32) says which input pixel a tap meets, or -1. float32, all contiguous.
def make_patches(maps: Tensor, met: Tensor, patches: Tensor) -> None: ...
def add_patches(patches: Tensor, met: Tensor, maps: Tensor) -> None: ...

# Which rows or columns of (rows, positions, columns), in any strides, are zero throughout.
def dead_rows(x: Tensor, dead: Tensor) -> None: ...
def dead_columns(x: Tensor, dead: Tensor) -> None: ...

# Of scheme `split`.
def sum_rows(x: Tensor, vectors: Tensor, out: Tensor) -> None: ...

# Whether the instruction set has what the next two need, which return what was refused.
def shares() -> bool: ...
def expand(seed: bytes, block: int, out: Tensor, half: int) -> list[int]: ...
def share(
    x: Tensor,
    scales: Tensor | None,
    ratio: float,
    least_step: float,
    seeds: Sequence[bytes],
    first: int,
    out: Tensor,
    steps: Tensor,
    vectors: Tensor | None,
    sums: Tensor | None,
) -> list[tuple[int, int, int]]: ...
def combine(
    parts: Sequence[Tensor],
    steps: Tensor,
    scales: Tensor | None,
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    vectors: Tensor | None,
    sums: Tensor | None,
    added: Sequence[tuple[Tensor, Tensor] | None] = ...,
) -> None: ...

# Of trusted layers: float32 operands; what is computed goes into the last ones.
def activation(name: str, x: Tensor, g: Tensor | None, out: Tensor) -> None: ...
def gated(name: str, x: Tensor, up: Tensor, g: Tensor | None, out: Tensor, dup: Tensor | None) -> None: ...
def rms_norm(x: Tensor, weight: Tensor, g: Tensor | None, out: Tensor, inverse: Tensor, eps: float) -> None: ...
def sum_channels(
    x: Tensor,
    g: Tensor | None,
    y: Tensor | None,
    center: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    passed: Tensor | None,
    sums: Tensor,
) -> None: ...
def normalize(x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, relu: bool, out: Tensor) -> None: ...
def normalize_gradient(
    x: Tensor,
    g: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    center: Tensor | None,
    slope: Tensor | None,
    mean: Tensor | None,
    out: Tensor,
) -> None: ...
def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None: ...
def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool) -> None: ...
def attention_gradient(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
    causal: bool,
) -> None: ...

"""The messages of the protocol: a fixed schema, decoded strictly, nothing executable.

A message is a small msgpack header (below) followed by raw tensor bytes; `frame` puts the two on a stream. Layers,
weights and operands are opaque numbers chosen by the trusted side. A worker learns shapes, numbers and which product
to compute, and nothing else. See ``docs/wire.md``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

PROTOCOL = 5
"""Version of everything in this file; a hello with another one is refused."""

DType = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "mxint8"]
"""Names of PyTorch's, and ``mxint8``: operands only, packed as in `tempo.wire.blocks`."""

Number = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Size = Annotated[int, Meta(ge=0, le=1 << 40)]
Shape = Annotated[tuple[Size, ...], Meta(max_length=6)]
Name = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,15}\Z")]
Text = Annotated[str, Meta(max_length=1024)]
Small = Annotated[int, Meta(ge=0, le=1 << 16)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Geometry = Annotated[tuple[Small, ...], Meta(max_length=3)]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Immutable and strict."""


class TensorRef(_Struct, frozen=True):
    """One tensor of a message: what it is, and where its bytes are.

    ``segment`` -1 means inline: the bytes follow the header, in the order of the references. Otherwise they lie in
    that shared-memory segment at ``offset``.
    """

    name: Name
    dtype: DType
    shape: Shape
    segment: Annotated[int, Meta(ge=-1, lt=1 << 20)] = -1
    offset: Size = 0


class _Request(_Struct, frozen=True, kw_only=True):
    """What is answered. `Link.request` fills in these three; ids grow with every request of a connection."""

    id: Number = 0
    tensors: tuple[TensorRef, ...] = ()
    wants: tuple[TensorRef, ...] = ()


# --- products -----------------------------------------------------------------------------------------------------


class Linear(_Struct, frozen=True, tag="linear"):
    """``Y = X Wᵀ``: x is T×d, w is m×d (PyTorch's layout), y is T×m."""

    channels_last: ClassVar = False


class Conv(_Struct, frozen=True, tag="conv"):
    """A convolution over one to three spatial axes, without bias; x is N×C×…, w is O×(C/groups)×….

    With ``channels_last`` x, y, g and dx travel as N×…×C.
    """

    stride: Geometry
    padding: Geometry
    dilation: Geometry
    groups: Annotated[int, Meta(ge=1, le=1 << 16)]
    channels_last: bool = False


class Residues(_Struct, frozen=True, tag="residues"):
    """``Y = X Wᵀ mod p`` exactly: x (T×d), g, y and dx are residues in int32, w (m×d) is int8 or int16.

    ``p`` and residues are those of `tempo.wire.residues`. There is no ``dw``. Instead of ``x`` or ``g`` may come a
    ``seed``, 32 bytes of uint8, of which the worker expands it.
    """

    channels_last: ClassVar = False


Product = Linear | Conv | Residues


# --- optimizers that a worker may run on a stored weight: hyper-parameters of one step, named as in torch.optim ---


class Sgd(_Struct, frozen=True, tag="sgd"):
    """Gradient descent, with momentum unless that is 0."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool


class Adam(_Struct, frozen=True, tag="adam"):
    """Adam; AdamW where ``decoupled``. ``steps`` were made before this one."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    amsgrad: bool
    maximize: bool
    steps: Number


class Lion(_Struct, frozen=True, tag="lion"):
    """The sign of an interpolated momentum."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float


class Muon(_Struct, frozen=True, tag="muon"):
    """Orthogonalised momentum; ``adjusted_lr`` scales the update, ``lr`` the decay."""

    lr: float
    adjusted_lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    coefficients: tuple[float, float, float]
    eps: float
    iterations: Annotated[int, Meta(ge=0, lt=100)]


Rule = Sgd | Adam | Lion | Muon


# --- from the trusted side ----------------------------------------------------------------------------------------


class Hello(_Struct, frozen=True, tag="hello"):
    """First message of a connection. ``session`` is a random public name, used for transcripts only."""

    protocol: Number
    version: Text
    session: Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
    capabilities: Annotated[tuple[Name, ...], Meta(max_length=32)] = ()


class Segment(_Struct, frozen=True, tag="segment"):
    """Announces a shared-memory segment whose descriptor travels with this message. Unix sockets only. No answer."""

    segment: Annotated[int, Meta(ge=0, lt=1 << 20)]
    size: Size


class Store(_Request, frozen=True, kw_only=True, tag="store"):
    """Keep tensor ``w`` under the number ``weight``. Answered by an empty `Result`.

    With it may come what an optimizer kept of it (``momentum_buffer``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq``)
    and its ``gradient`` so far, all of its shape and dtype, for `Update` to go on with.

    Or no tensor comes, and ``w`` is made of public integers that the worker has, one below the other, named by their
    ``digests`` (`tempo.wire.integers.digest`). Where it lacks one it fails with ``unknown-digest``.
    """

    step: Number
    layer: Number
    weight: Number
    digests: Annotated[tuple[Digest, ...], Meta(max_length=1024)] = ()


class Seek(_Request, frozen=True, kw_only=True, tag="seek"):
    """Ask whether a later `Store` by ``digest`` would find it. Answered as that would be; nothing is kept."""

    digest: Digest


class Forward(_Request, frozen=True, kw_only=True, tag="forward"):
    """Multiply ``x`` by a stored weight, answer ``y``; keep ``x`` as ``operand`` unless that is 0."""

    step: Number
    layer: Number
    weight: Number
    operand: Number
    product: Product


class Backward(_Request, frozen=True, kw_only=True, tag="backward"):
    """From ``g``, answer ``dx`` (with the stored weight) and/or ``dw`` (with the kept operand), as wanted, in order.

    With ``accumulate``, ``dw`` is added to the gradient that is kept with the weight, and may not be wanted; where
    nothing else is, the answer is an empty `Result`.
    """

    step: Number
    layer: Number
    weight: Number
    operand: Number
    product: Product
    accumulate: bool = False


class Update(_Request, frozen=True, kw_only=True, tag="update"):
    """Change a stored weight by its gradient times ``scale``; drop the gradient. Answered by an empty `Result`.

    Without a gradient it fails. What the optimizer keeps and `Store` did not bring begins as it does in `torch.optim`.
    """

    step: Number
    layer: Number
    weight: Number
    rule: Rule
    scale: float = 1.0


class Fetch(_Request, frozen=True, kw_only=True, tag="fetch"):
    """Answer what is kept of a weight, as wanted.

    Names are those of `Store`, and ``norm``: the length of the gradient, shape (1,) of float64. It fails where
    something wanted is not there.
    """

    step: Number
    layer: Number
    weight: Number


class Forget(_Struct, frozen=True, tag="forget"):
    """Drop weights (with all that is kept of them), operands, and gradients of weights that stay.

    Unknown numbers are ignored. No answer.
    """

    weights: tuple[Number, ...] = ()
    operands: tuple[Number, ...] = ()
    gradients: tuple[Number, ...] = ()


class Probe(_Request, frozen=True, kw_only=True, tag="probe"):
    """Measure: return the wanted tensors (any content), having multiplied two ``size``×``size`` float32 matrices."""

    size: Annotated[int, Meta(ge=0, le=16384)]


# --- from the worker ----------------------------------------------------------------------------------------------


class Welcome(_Struct, frozen=True, tag="welcome"):
    """Answer to `Hello`."""

    protocol: Number
    version: Text
    device: Text
    memory_limit: Size
    capabilities: Annotated[tuple[Name, ...], Meta(max_length=32)] = ()


class Result(_Struct, frozen=True, tag="result"):
    """One answer to request ``id``: a tensor that was wanted, or none to acknowledge a request that wants none.

    ``nanoseconds`` is the worker's own account of its compute time; information, never trusted.
    """

    id: Number
    nanoseconds: Number
    tensors: tuple[TensorRef, ...]


FailureCode = Literal["refused", "out-of-memory", "unknown-number", "unknown-digest", "bad-request", "failed"]


class Failure(_Struct, frozen=True, tag="failure"):
    """Request ``id`` could not be served (or the hello was refused: id 0); the connection stays open otherwise."""

    id: Number
    code: FailureCode
    message: Text


class Alive(_Struct, frozen=True, tag="alive"):
    """A sign of life, sent every `BEAT` seconds whatever else happens: a worker that is silent for longer is stuck.

    ``starved``: all that arrived is served, and nothing came since the sign before. Who waits for an answer, and is
    told so again and again, is not heard any more.
    """

    starved: bool


BEAT = 1.0
"""Seconds between signs of life."""

Request = Store | Seek | Forward | Backward | Update | Fetch | Probe
ToWorker = Hello | Segment | Store | Seek | Forward | Backward | Update | Fetch | Forget | Probe
ToTrusted = Welcome | Result | Failure | Alive

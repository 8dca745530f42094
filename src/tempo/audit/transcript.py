"""Reads transcripts: everything that one worker received or returned, as calls of products in order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tempo.errors import AuditError
from tempo.wire.layout import meant
from tempo.wire.messages import Linear, Product, Residues

VERSION = 1


class Stored(Mapping[str, Tensor]):
    """The tensors of one safetensors file, read when they are asked for."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            with safe_open(file, "pt") as opened:
                self._names = list(opened.keys())
                self.metadata: dict[str, str] = opened.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise AuditError(f"{file} cannot be read: {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Record:
    """One message that a worker got, with its answer."""

    step: int
    sequence: int
    layer: int
    operation: str
    worker: str
    weight: int
    operand: int
    product: Product
    tensors: Mapping[str, Tensor]

    @property
    def place(self) -> tuple[int, int, int, str]:
        """What names this message, in the transcript and in the truth."""
        return self.step, self.sequence, self.layer, self.operation


@dataclass
class Call:
    """One use of a product: the weight it used, what came in, what went out, and its backward pass if there was one.

    All tensors are masked, as the worker has them: ``x`` T×d, ``w`` m×d, ``y`` T×m, ``g`` T×m, ``dx`` T×d, ``dw`` m×d;
    of convolutions with spatial axes behind. One that was not part of the call is None. ``updated`` is the last change
    that the worker had made to the weight by then, if any. Residues are given as numbers of floating point.
    ``passes`` counts backward passes before it, where weights never change and so tell no steps.
    """

    stored: Record
    forward: Record
    backward: Record | None = None
    updated: Record | None = None
    passes: int = 0

    @property
    def step(self) -> int:
        """Training step, counted by changes of weights, or by backward passes."""
        return self.passes if self.public else self.forward.step

    @property
    def public(self) -> bool:
        """Whether its weight is public, and went out as it is: ``w`` is its integers then."""
        return isinstance(self.forward.product, Residues)

    @property
    def layer(self) -> int:
        """The opaque number of the product."""
        return self.forward.layer

    @property
    def sequence(self) -> int:
        """Place in the order of sending."""
        return self.forward.sequence

    @property
    def product(self) -> Product:
        """What was computed; of residues too, a fully connected layer."""
        return Linear() if self.public else self.forward.product

    @property
    def weight(self) -> int:
        """Opaque number of the masked weight: calls that share it share ``A`` and ``P``."""
        return self.forward.weight

    @property
    def w(self) -> Tensor:
        """``w~``."""
        return _numbers((self.updated or self.stored).tensors["w"])

    @property
    def x(self) -> Tensor:
        """``x~``."""
        return meant(self.product, "x", _numbers(self.forward.tensors["x"]))

    @property
    def y(self) -> Tensor | None:
        """``y~``."""
        y = self.forward.tensors.get("y")
        return None if y is None else meant(self.product, "y", _numbers(y))

    @property
    def g(self) -> Tensor | None:
        """``g~``."""
        return self._back("g")

    @property
    def dx(self) -> Tensor | None:
        """``dx~``."""
        return self._back("dx")

    @property
    def dw(self) -> Tensor | None:
        """``dw~``; where the worker kept it instead of returning it, what it made of ``g~`` and ``x~``."""
        dw, g = self._back("dw"), self.g
        if dw is None and g is not None and isinstance(self.product, Linear):
            return g.T @ self.x
        return dw

    def _back(self, name: str) -> Tensor | None:
        found = None if self.backward is None else self.backward.tensors.get(name)
        return None if found is None else meant(self.product, name, _numbers(found))


def _numbers(t: Tensor) -> Tensor:
    return t if t.is_floating_point() else t.float()


@dataclass(frozen=True)
class Rekey:
    """A product's matrices before and after its masks were renewed: ``w`` and, if it lived on the worker, what its
    optimizer kept (`tempo.worker.update.STATES`); then they are the same, otherwise a step of training lies between.

    ``calls`` are those under the old masks, then those under the new ones.
    """

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    calls: tuple[list[Call], list[Call]]


@dataclass
class View:
    """All that one worker saw of a session."""

    worker: str
    calls: list[Call] = field(default_factory=list)
    fetched: list[Record] = field(default_factory=list)
    """What was taken back of weights that lived here."""

    @property
    def layers(self) -> list[int]:
        """The products' numbers, in the order of their first use."""
        return list(dict.fromkeys(call.layer for call in self.calls))

    @property
    def steps(self) -> list[int]:
        """Steps seen, in order."""
        return sorted({call.step for call in self.calls})

    def of(self, layer: int) -> list[Call]:
        """The calls of one product, in order."""
        return [call for call in self.calls if call.layer == layer]

    def rekeys(self, layer: int) -> list[Rekey]:
        """Each time that a product's masks were renewed, in order."""
        eras: dict[int, list[Call]] = {}
        for call in self.of(layer):
            eras.setdefault(call.weight, []).append(call)
        returned = {record.weight: record.tensors for record in self.fetched}
        return [
            Rekey(returned.get(old[0].weight, {"w": old[-1].w}), new[0].stored.tensors, (old, new))
            for old, new in pairwise(eras.values())
        ]

    def at(self, step: int) -> list[Call]:
        """The calls of one step, in order."""
        return [call for call in self.calls if call.step == step]


def assemble(records: Iterable[Record]) -> list[View]:
    """Sort messages into calls: one view for each worker.

    Raises:
        AuditError: A message refers to a weight that is not there.
    """
    views: dict[str, View] = {}
    weights: dict[tuple[str, int], Record] = {}
    updates: dict[tuple[str, int], Record] = {}
    open_calls: dict[tuple[str, int], Call] = {}
    backward: Counter[str] = Counter()
    """Whether gradients of residues came last, by worker."""
    for record in sorted(records, key=lambda r: r.sequence):
        view = views.setdefault(record.worker, View(record.worker))
        if record.operation == "store":
            weights[record.worker, record.weight] = record
            updates.pop((record.worker, record.weight), None)
        elif record.operation == "fetch" and "w" in record.tensors:
            view.fetched.append(record)
        elif record.operation == "update":
            updates[record.worker, record.weight] = record
        elif record.operation == "forward":
            stored = weights.get((record.worker, record.weight))
            if stored is None:
                raise AuditError(f"message {record.sequence} uses weight {record.weight}, which was never stored")
            last = view.calls[-1] if view.calls else None
            passes = 0 if last is None or not isinstance(record.product, Residues) else last.passes
            call = Call(
                stored, record, None, updates.get((record.worker, record.weight)), passes + backward[record.worker]
            )
            backward[record.worker] = 0
            view.calls.append(call)
            if record.operand:
                open_calls[record.worker, record.operand] = call
        elif record.operation == "backward" and (record.worker, record.operand) in open_calls:
            open_calls[record.worker, record.operand].backward = record
        elif record.operation == "backward" and isinstance(record.product, Residues):
            # It names no operand: the last call of the layer that waits for one, as far as anyone can tell.
            waiting = [call for call in view.of(record.layer) if call.backward is None]
            if waiting:
                waiting[-1].backward = record
            backward[record.worker] = 1
    return list(views.values())


def read(folder: Path) -> list[View]:
    """The views in the transcript of one session.

    Args:
        folder: A session's folder, or one that holds exactly one session.

    Raises:
        AuditError: There is no transcript, more than one, or a file is damaged.
    """
    folder = session_folder(folder)
    return assemble(_record(file) for file in sorted(folder.glob("*-*.safetensors")))


def session_folder(folder: Path) -> Path:
    """The one folder with a ``manifest.json`` that ``folder`` is or holds."""
    found = [folder] if (folder / "manifest.json").is_file() else [m.parent for m in folder.glob("*/manifest.json")]
    if len(found) != 1:
        names = ", ".join(sorted(path.name for path in found)) or "none"
        raise AuditError(f"{folder}: expected the transcript of one session (a manifest.json), found {names}")
    version = json.loads((found[0] / "manifest.json").read_text()).get("version")
    if version != VERSION:
        raise AuditError(f"{found[0]} has format {version!r}; this version reads {VERSION}")
    return found[0]


def place_of(file: Path) -> tuple[int, int, int, str]:
    """Step, sequence, layer and operation, from a file's name."""
    try:
        step, sequence, layer, operation = file.stem.split("-")
        return int(step), int(sequence), int(layer), operation
    except ValueError:
        raise AuditError(f"{file} is not named like a message: STEP-SEQUENCE-LAYER-OPERATION.safetensors") from None


def _record(file: Path) -> Record:
    tensors = Stored(file)
    about = tensors.metadata
    product: Product = Linear()
    if "product" in about:
        product = msgspec.json.decode(about["product"], type=Product)
    weight, operand = int(about.get("weight", 0)), int(about.get("operand", 0))
    return Record(*place_of(file), about.get("worker", ""), weight, operand, product, tensors)

"""The plain operands and masks behind a transcript: what attacks are scored by, and never see."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from tempo.audit.samples import Samples
from tempo.audit.transcript import Call, Stored, place_of, session_folder
from tempo.errors import AuditError
from tempo.schemes.masks import IDENTITY, Form, Mask, Masks
from tempo.schemes.operators import Blocks, Gather
from tempo.schemes.sandwich import sandwich
from tempo.wire.messages import Linear

Which = Literal["L", "A", "P"]


@dataclass(frozen=True)
class CallTruth:
    """The plain side of one call.

    ``tensors`` holds the plain ``x``, ``w`` and, where there are any, ``y``, ``g``, ``dx``, all with real rows only
    (shield rows left out), ``w`` without a cloak; besides everything the masks consist of, by `Mask.tensors`' names.
    """

    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        """A plain tensor, or None."""
        return self.tensors.get(name)

    def mask(self, which: Which) -> Mask:
        """``L`` (rows), ``A`` (input features) or ``P`` (output features); see `tempo.schemes.masks`."""
        return rebuild(which.lower(), self.tensors)

    def permutation(self, which: Which) -> Tensor:
        """Of a generalised permutation alone: masked row ``i`` is plain row ``permutation[i]``.

        Raises:
            AuditError: The mask has blocks.
        """
        mask = self.mask(which)
        if mask.blocks:
            raise AuditError(f"mask {which} mixes blocks: no permutation says where a row went")
        return mask.gathers[0].index.long() if mask.gathers else torch.arange(self._size(which))

    def matrix(self, which: Which) -> Tensor:
        """The mask as a dense float64 matrix ``M``: masked = ``M`` plain along that axis. Small axes only."""
        mask = self.mask(which)
        operator = mask.operator(Form.PLAIN)
        if operator is None:
            return torch.eye(self._size(which), dtype=torch.float64)
        matrix = torch.empty(operator.size, operator.size, dtype=torch.float64)
        sandwich(torch.eye(operator.size, dtype=torch.float64), operator, None, [matrix])
        return matrix

    def _size(self, which: Which) -> int:
        return int({"L": self["x"].shape[0], "A": self["x"].shape[1], "P": self["w"].shape[0]}[which])


def unmasked(behind: CallTruth, w_masked: Tensor) -> Tensor:
    """``w`` of ``w~``, by masks and cloak, to within its own rounding."""
    w = torch.empty(w_masked.shape, dtype=torch.float64)
    Masks(A=behind.mask("A"), P=behind.mask("P")).decode("w", w_masked.double(), [w])
    if (u := behind.get("cloak_u")) is not None:
        w -= u.double() @ behind["cloak_v"].double()
    return w.to(w_masked.dtype)


def rebuild(name: str, tensors: Mapping[str, Tensor]) -> Mask:
    """The mask that `Mask.tensors` called ``name``; the identity where there is none."""
    if f"{name}_permutation" not in tensors:
        return IDENTITY
    gathers, stages, inverses = [], [], []
    number = 0
    while (prefix := f"{name}{number or ''}") + "_permutation" in tensors:
        gathers.append(Gather(tensors[f"{prefix}_permutation"], tensors.get(f"{prefix}_scale")))
        batches: list[Tensor] = []
        while f"{prefix}_blocks{len(batches)}" in tensors:
            batches.append(tensors[f"{prefix}_blocks{len(batches)}"])
        if batches:
            stages.append(Blocks(tuple(batches)))
            inverses.append(Blocks(tuple(torch.linalg.inv(batch) for batch in batches)))
        number += 1
    return Mask(tuple(gathers), tuple(stages), tuple(inverses))


@dataclass
class Truth:
    """The plain side of a transcript.

    Args:
        records: Plain tensors and masks by message.
        names: The layers' names by number.
        victim: The trained model, in plain, if at hand.
        members: Samples that it was trained on.
        test: Samples that it was not.
    """

    records: Mapping[tuple[int, int, int, str], Mapping[str, Tensor]]
    names: Mapping[int, str] = field(default_factory=dict)
    victim: nn.Module | None = None
    members: Samples | None = None
    test: Samples | None = None

    def of(self, call: Call) -> CallTruth:
        """What is behind ``call``.

        Raises:
            AuditError: The truth is of another session, or incomplete.
        """
        found = ChainMap[str, Tensor]()
        # What a worker has changed is nowhere in plain; and what it changes was not recorded when it was sent.
        plain = call.stored.place in self.records or not isinstance(call.product, Linear)
        away = call.updated is not None or not plain
        for record in (None if away else call.stored, call.forward, call.backward):
            if record is None:
                continue
            if record.place not in self.records:
                raise AuditError(f"no truth is recorded for message {record.sequence} ({record.operation})")
            found.maps.append(cast("dict[str, Tensor]", self.records[record.place]))  # read only, and lazily
        if away:
            found.maps.append({"w": unmasked(CallTruth(found), call.w)})
        if "columns" in found:  # the part of the output features that this worker's operator holds
            found["w"] = found["w"][found["columns"].long()]
        return CallTruth(found)

    def name(self, layer: int) -> str:
        """The layer's name, or its number."""
        return self.names.get(layer, str(layer))

    @cached_property
    def is_masked(self) -> bool:
        """Whether any message was masked at all."""
        return any("a_permutation" in tensors for tensors in self.records.values())


def read(folder: Path) -> Truth:
    """The truth that ``insecure_record_truth`` wrote.

    Raises:
        AuditError: It cannot be read.
    """
    folder = session_folder(folder)
    records = {place_of(file): Stored(file) for file in folder.glob("worker*/*.safetensors")}
    file = folder / "names.json"
    names = {int(number): name for number, name in json.loads(file.read_text()).items()} if file.is_file() else {}
    return Truth(records, names)

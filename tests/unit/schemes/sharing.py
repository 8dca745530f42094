"""Products under scheme `split` without any process: what each worker sees, and what its honest answers are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from in_process import WORKER, empty, targets
from torch import Tensor

from tempo.errors import WorkerLiedError
from tempo.keys import KeySchedule
from tempo.schemes.base import EncodedInput, Operand, Problem
from tempo.schemes.reply import Reply, Unmask
from tempo.schemes.split import PublicWeight, SharedGradient, SharedInput, Split
from tempo.wire.messages import Linear, Residues
from tempo.wire.residues import expand, reduce_


def share(operand: Operand) -> Tensor:
    """What a worker multiplies: what it was sent, or what it makes of a seed."""
    if "seed" in operand.tensors:
        return expand(operand.tensors["seed"].numpy().tobytes(), torch.empty(operand.stands_for, dtype=torch.int32))
    (sent,) = operand.tensors.values()
    return sent


def total(parts: list[Tensor]) -> Tensor:
    """Their sum mod p, int64."""
    return reduce_(torch.stack([part.long() for part in parts]).sum(0))


@dataclass
class Exchange:
    """A weight, held by workers of ``operators`` operators, and a key schedule of its own."""

    weight: PublicWeight
    w_q: Tensor
    keys: KeySchedule
    operators: int

    @classmethod
    def of(cls, w: Tensor, colluders: int = 1, bits: int = 9) -> Exchange:
        scheme, keys, everyone = Split(colluders, bits), KeySchedule(), targets(*map(str, range(colluders + 1)))
        weight = scheme.encode_weight(Problem(Linear(), torch.float32), w, keys.fresh(1, "w"), everyone, empty)
        assert isinstance(weight, PublicWeight)
        return cls(weight, weight.operands[0].tensors["w"], keys, colluders + 1)

    def send(self, x: Tensor) -> SharedInput:
        everyone = targets(*map(str, range(self.operators)))
        return self.weight.encode_input(x, self.keys.fresh(1, "x"), everyone, empty, lambda: x)

    def send_back(self, x: SharedInput, g: Tensor) -> SharedGradient:
        return x.encode_gradient(g, self.keys.fresh(1, "g"), empty, lambda: g, lambda: g, want_dw=False)

    def answers(self, sent: SharedInput | SharedGradient) -> dict[int, Tensor]:
        """Of honest workers."""
        found = {}
        for operand in sent.operands:
            mine = share(operand)
            features = self.w_q.shape[isinstance(sent, SharedGradient)]
            found[operand.worker] = torch.empty(len(mine), features, dtype=torch.int32)
            product = WORKER.forward if isinstance(sent, EncodedInput) else WORKER.input_gradient
            product(Residues(), mine, self.w_q, found[operand.worker])
        return found

    def y(self, sent: SharedInput, answers: dict[int, Tensor] | None = None) -> Tensor:
        (y,) = sent.decode_output(passed(answers or self.answers(sent)), [len(self.w_q)])
        return y

    def dx(self, sent: SharedGradient, answers: dict[int, Tensor] | None = None) -> Tensor:
        return sent.decode_input_gradient(passed(answers or self.answers(sent)))


class Named(Reply):
    """An answer whose worker is named where it is wrong."""

    def __init__(self, tensor: Tensor, worker: int) -> None:
        self.shape, self._tensor, self._worker = tensor.shape, tensor, worker

    def checked(self) -> Tensor:
        return self._tensor

    def wrong(self, row: int) -> WorkerLiedError:
        error = WorkerLiedError(f"wrong in row {row}")
        error.worker = self._worker
        return error

    def read(self, unmask: Unmask) -> None:
        raise NotImplementedError


def passed(answers: dict[int, Tensor]) -> dict[int, Named]:
    return {worker: Named(answer, worker) for worker, answer in answers.items()}

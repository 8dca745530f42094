"""One product under a scheme from end to end, as the engine does it, with the workers' part done here: timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from types import SimpleNamespace
from typing import Any, Final, final

import torch
from torch import Tensor

from tempo.engine.buffers import Buffers
from tempo.engine.geometry import Shape, flops, output_shape
from tempo.engine.reply import Received
from tempo.engine.stats import Stats
from tempo.engine.verifier import Verifier
from tempo.keys import KeySchedule
from tempo.schemes import arithmetic
from tempo.schemes.base import Operand, Problem, Scheme, Target
from tempo.schemes.reply import Reply
from tempo.verify.checks import AnswerCheck, WeightCheck
from tempo.wire.residues import expand
from tempo.wire.shared import Segments
from tempo.worker.modular import Doubles

NAMES: Final = ("w", "x", "y", "g", "dx", "dw")

Seconds = dict[str, float]
"""By what they are spent on: an operand or an answer, one of `NAMES`."""

Answers = dict[str, dict[int, Tensor]]
"""By name and worker."""


@final
class SampleRun:
    """Call it for seconds: of masks by `NAMES`, of checks by ``check NAME``, and of the plain ``product``.

    Attributes:
        elements: Of what travelled in the last call, by name.
        whole: Of the plain operand or answer, with the rows that the scheme adds.
        flops: Of ``product``.
    """

    def __init__(
        self,
        scheme: Scheme,
        problem: Problem,
        dtype: torch.dtype,
        x: Shape,
        w: Shape,
        targets: Sequence[Target],
        keys: KeySchedule,
    ) -> None:
        self._scheme, self._problem, self._dtype, self._keys, self._targets = scheme, problem, dtype, keys, targets
        self._trained = not scheme.traits.public_weights
        self._x, self._w = _numbers(x, dtype), _numbers(w, dtype)
        self._g = _numbers(output_shape(problem.product, x, w), dtype)
        filled = scheme.rows_sent(x[0]) / x[0]
        inputs, outputs = self._x.numel() * filled, self._g.numel() * filled
        self.whole = dict(zip(NAMES, (prod(w), inputs, outputs, outputs, inputs, prod(w)), strict=True))
        self.elements: dict[str, int] = {}
        self.flops = 0
        self._took: Seconds = {}
        self._stats = Stats()

    def __call__(self) -> Seconds:
        """Seconds of each part."""
        x, w, g, fresh = self._x, self._w, self._g, self._keys.fresh
        self._took = dict.fromkeys([*NAMES, *(f"check {name}" for name in NAMES), "product"], 0.0)
        with self._timed("w"):
            weight = self._scheme.encode_weight(self._problem, w, fresh(0, "w"), self._targets, _empty)
        with self._timed("x"):
            source = weight.encode_input(x, fresh(0, "x"), self._targets, _empty, lambda: w)
        with self._timed("g"):
            gradient = source.encode_gradient(g, fresh(0, "g"), _empty, lambda: x, lambda: w, want_dw=self._trained)
        masked = {operand.worker: dict(operand.tensors) for operand in weight.operands}
        for name, operands in (("x", source.operands), ("g", gradient.operands)):
            for operand in operands:
                masked[operand.worker] |= _expanded(operand, name)
        answers: Answers = {"y": {}, "dx": {}, "dw": {}}
        replies = (self._exact if self._scheme.traits.exact else self._rounded)(masked, answers)
        with self._timed("y"):
            source.decode_output(replies["y"], [len(w)])
        with self._timed("dx"):
            gradient.decode_input_gradient(replies["dx"])
        if self._trained:
            with self._timed("dw"):
                gradient.decode_weight_gradient(replies["dw"], [len(w)])
        everything = [*masked.values(), *({name: t} for name, by_worker in answers.items() for t in by_worker.values())]
        self.elements = {name: sum(part[name].numel() for part in everything if name in part) for name in NAMES}
        return self._took

    def _rounded(self, masked: dict[int, dict[str, Tensor]], answers: Answers) -> dict[str, dict[int, Reply]]:
        """What workers answer, in floating point, each answer with its check."""
        product, fresh = self._problem.product, self._keys.fresh
        replies: dict[str, dict[int, Reply]] = {name: {} for name in answers}
        self.flops = 0
        for worker, sent in masked.items():
            plain = {name: tensor.to(self._dtype) for name, tensor in sent.items()}
            with self._timed("product"):
                y = arithmetic.output(product, plain["x"], plain["w"])
                dx = arithmetic.input_gradient(product, plain["g"], plain["w"], tuple(plain["x"].shape))
                dw = arithmetic.weight_gradient(product, plain["x"], plain["g"], tuple(plain["w"].shape))
            self.flops += 3 * flops(product, tuple(plain["x"].shape), tuple(plain["w"].shape))
            for name, answer in {"y": y, "dx": dx, "dw": dw}.items():
                answers[name][worker] = answer.to(self._problem.wire_dtype)
            with self._timed("w"), self._stats.timed("verify"):
                kept = WeightCheck(product, sent["w"], fresh(0, "verify-w"))
            with self._timed("x"), self._stats.timed("verify"):
                inputs = kept.forward(sent["x"], fresh(0, "verify-x"), keep=True)
            with self._timed("g"), self._stats.timed("verify"):
                gradients = inputs.backward(sent["g"], want_dx=True, want_dw=True)
            checks = {
                "y": inputs.output_check(),
                "dx": gradients.input_gradient_check(),
                "dw": gradients.weight_gradient_check(),
            }
            for name, check in checks.items():
                replies[name][worker] = self._received(name, answers[name][worker], check)
        return replies

    def _exact(self, masked: dict[int, dict[str, Tensor]], answers: Answers) -> dict[str, dict[int, Reply]]:
        """What workers answer mod p; the scheme checks it."""
        replies: dict[str, dict[int, Reply]] = {name: {} for name in answers}
        with self._timed("product"):
            torch.mm(self._x, self._w.t())
            torch.mm(self._g, self._w)
        self.flops = 2 * flops(self._problem.product, tuple(self._x.shape), tuple(self._w.shape))
        for worker, sent in masked.items():
            for name, operand, w_q in (("y", sent["x"], sent["w"].t()), ("dx", sent["g"], sent["w"])):
                answers[name][worker] = torch.empty(len(operand), w_q.shape[1], dtype=torch.int32)
                Doubles(w_q, int(w_q.abs().max())).multiply(operand, answers[name][worker])
                replies[name][worker] = self._received(name, answers[name][worker], None)
        return replies

    def _received(self, name: str, answer: Tensor, check: AnswerCheck | None) -> Received:
        # What `Received` needs of an engine: its answers do not lie in shared memory, and are all right.
        link = SimpleNamespace(address="here", buffers=Buffers(Segments(), shared=False, packs=False))
        engine: Any = SimpleNamespace(links=[link], stats=self._stats, verifier=Verifier("always"), step=0)
        return Received(engine, 0, name, "", answer, check)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        before, checked = self._stats.seconds["mask"], self._stats.seconds["verify"]
        with self._stats.timed("mask"):
            yield
        self._took[name] += self._stats.seconds["mask"] - before
        if name != "product":
            self._took[f"check {name}"] += self._stats.seconds["verify"] - checked


def _expanded(operand: Operand, name: str) -> dict[str, Tensor]:
    """Its tensors, with operand ``name`` in the place of a seed of it."""
    if operand.stands_for is None:
        return operand.tensors
    seed = operand.tensors["seed"].numpy().tobytes()
    return {name: expand(seed, torch.empty(operand.stands_for, dtype=torch.int32))}


def _numbers(shape: Shape, dtype: torch.dtype) -> Tensor:
    """No row of zeros, which schemes would cover; and nothing of the user's random generator."""
    return torch.linspace(-1, 2, prod(shape)).view(shape).to(dtype)


def _empty(worker: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)

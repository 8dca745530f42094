"""Views under scheme `split`: of workers that put their shares together, and of one that got no shares at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tempo.audit.report.contents import Attacker
from tempo.audit.transcript import Call, Record, View
from tempo.wire.messages import Residues
from tempo.wire.residues import SEED_BYTES, expand, reduce_
from tempo.worker.compute import TorchCompute


def attackers(views: Sequence[View]) -> dict[Attacker, list[View]]:
    """Who may attack what was recorded, and by which views: each operator; all of them, the control; and a simulator,
    the floor.

    Args:
        views: Of workers that took part in every product.
    """
    return {
        "each operator": list(views),
        "all operators together": [together(views)],
        "a simulator": [simulated(views[0])],
    }


def together(views: Sequence[View]) -> View:
    """What workers have who add their shares mod p, as one worker's view: rows, up to their steps."""
    calls = []
    for parts in zip(*(view.calls for view in views), strict=True):
        backward = [part.backward for part in parts if part.backward is not None]
        forward = _added([part.forward for part in parts])
        calls.append(replace(parts[0], forward=forward, backward=_added(backward) if backward else None))
    return View(" and ".join(view.worker for view in views), calls)


def simulated(view: View) -> View:
    """A view of the same form, made without anything that was sent but public weights: what attacks reach on it is what
    they reach where there is nothing to find.
    """
    return View("a simulator", [_anew(call) for call in view.calls])


def _added(records: Sequence[Record]) -> Record:
    tensors = {
        name: reduce_(torch.stack([record.tensors[name].long() for record in records]).sum(0)).int()
        for name in records[0].tensors
    }
    return replace(records[0], tensors=tensors)


def _anew(call: Call) -> Call:
    compute, w = TorchCompute(torch.device("cpu")), call.stored.tensors["w"]
    x = _uniform(call.forward.tensors["x"])
    y = torch.empty(len(x), len(w), dtype=torch.int32)
    compute.forward(Residues(), x, w, y)
    forward, backward = replace(call.forward, tensors={"x": x, "y": y}), None
    if call.backward is not None:
        g, dx = _uniform(y), torch.empty_like(x)
        compute.input_gradient(Residues(), g, w, dx)
        backward = replace(call.backward, tensors={"g": g, "dx": dx})
    return replace(call, forward=forward, backward=backward)


def _uniform(like: Tensor) -> Tensor:
    return expand(os.urandom(SEED_BYTES), torch.empty(like.shape, dtype=torch.int32))

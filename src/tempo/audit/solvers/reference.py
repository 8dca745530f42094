"""What an attacker finds out on a network of its own: the plain inputs of every product, for data like the victim's."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from tempo.audit.attack import NotApplicable
from tempo.audit.knowledge import Knowledge
from tempo.audit.transcript import View

SAMPLES = 256
"""Of the attacker's own, at the most."""


def plain_inputs(view: View, knowledge: Knowledge) -> dict[int, Tensor]:
    """Plain inputs of ``view``'s products, by layer, for the attacker's samples.

    With the base checkpoint, of all products. Without, only of those whose input does not depend on weights: it is
    looked up which stay the same from one random start to another.

    Raises:
        NotApplicable: The products cannot be told, or all inputs depend on unknown weights.
    """
    names = knowledge.names(view)
    if not names or knowledge.architecture is None or knowledge.data is None:
        raise NotApplicable("products cannot be matched with the architecture's modules")
    inputs = knowledge.data.inputs[:SAMPLES]
    runs = []
    for seed in (0, 1) if knowledge.base is None else (0,):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = knowledge.architecture()
        if knowledge.base is not None:
            model.load_state_dict(dict(knowledge.base), strict=False)
        runs.append(_inputs(model, inputs, knowledge.trusted, knowledge.unfolds(view)))
    first, last = runs[0], runs[-1]
    known = {name: x for name, x in first.items() if name in last and torch.equal(x, last[name])}
    found = {layer: known[" + ".join(modules)] for layer, modules in names.items() if " + ".join(modules) in known}
    if not found:
        raise NotApplicable("the inputs of all products depend on weights that the attacker does not know")
    return found


def _inputs(model: nn.Module, inputs: Tensor, trusted: tuple[str, ...], unfold: bool) -> dict[str, Tensor]:
    """Plain inputs by the name of the product, taken once layers that share an input have been found."""
    from tempo.audit import lab

    found: dict[str, Tensor] = {}
    with lab.open_lab(scheme="insecure-plain", unfold=unfold) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened.session.protect(model, base="secret", trusted=trusted)
        for number in range(3):
            # The first passes only find out which layers share their input.
            output = model(inputs if number == 2 else inputs[:2])
            getattr(output, "logits", output).sum().backward()
        opened.session.unprotect(model)
        calls, names = opened.views[0].calls if opened.views else [], opened.truth().names
    for call in calls:
        found[names[call.layer]] = call.x
    return found

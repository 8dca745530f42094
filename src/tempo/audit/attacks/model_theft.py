"""Model theft: all layers in one basis, the trusted parameters fitted between them, a network that runs.

What is assumed: the attacker has labelled samples of its own, none of the victim's, and never queries the victim.
Pixels of the first masked input are told by such samples' statistics; classes of the last output by their labels, its
scales and bias by its gradient, if the loss was cross-entropy. Running statistics of BatchNorm are the attacker's own
samples'. Whatever lies before the first product or behind the last one is trained on these samples: the transcript
says nothing of it. Trusted functions between products must keep channels apart: no attention, no LayerNorm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tempo.audit import theft
from tempo.audit.attack import Attack, Control, Effort, Evidence, Figure, NotApplicable, Outcome
from tempo.audit.controls import victims
from tempo.audit.knowledge import Knowledge
from tempo.audit.samples import Samples
from tempo.audit.solvers.assemble import Assembly
from tempo.audit.solvers.ends import align_inputs, align_outputs, name_classes
from tempo.audit.solvers.skeleton import Skeleton, is_pixels
from tempo.audit.transcript import Call, View
from tempo.audit.truth import Truth

REFIT = {"quick": 300, "full": 600}
"""Steps of training on the attacker's own samples, for layers that no transcript tells anything about."""


@dataclass(frozen=True)
class Stolen:
    """The attacker's network, how it came about, and the samples that it had."""

    model: nn.Module
    assembly: Assembly
    knowledge: Knowledge
    samples: Samples
    failed: str
    """Name of the product at which assembling ended; empty if all were placed."""


class ModelTheft(Attack):
    """Chains all products of one step to a network, and runs it."""

    name = "model-theft"
    knows = frozenset({"architecture", "data"})
    tries = (
        "Matches neighbouring products through the whole network, fits scales, biases and BatchNorm between them, and "
        "assembles a network that runs. Layers that stayed trusted are fitted to samples of its own."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> Stolen:
        """From the last step with a backward pass."""
        assert knowledge.architecture is not None  # noqa: S101 - it asks for it
        assert knowledge.data is not None  # noqa: S101
        names = knowledge.names(view)
        steps = [
            step for step in view.steps if {call.layer for call in view.at(step) if call.g is not None} >= {*names}
        ]
        if not names or not steps:
            raise NotApplicable("the products of no step with a backward pass fit the architecture")
        if any(len(members) > 1 for members in names.values()):
            raise NotApplicable("products of several layers (attention) are not taken apart")
        calls: dict[str, Call] = {}
        for call in view.at(steps[-1]):
            if call.g is not None and call.layer in names:
                calls.setdefault(names[call.layer][0], call)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = knowledge.architecture()
        skeleton = Skeleton(model, list(calls), knowledge.data.inputs[:64])
        for name, call in calls.items():
            if call.x.dim() == 2 and skeleton.modules[name].weight[0, 0].numel() > 1:
                raise NotApplicable(f"the convolution {name} was sent as patches, which are not taken apart")
        assembly = Assembly(skeleton, calls)
        failed = assembly.place()
        if not failed:
            self._install(assembly, knowledge.data, effort)
        model.float().eval()
        return Stolen(model, assembly, knowledge, knowledge.data, failed)

    def _install(self, assembly: Assembly, samples: Samples, effort: Effort) -> None:
        """Put what was recovered into the skeleton's model, and fit the rest to ``samples``."""
        model = assembly.skeleton.model
        first, last = next(iter(assembly.placed)), next(reversed(assembly.placed))
        unknown = [*assembly.front]
        if not assembly.front:
            align_inputs(assembly.placed[first], samples, assembly.placed[last])
        told = assembly.ends_in(last) and align_outputs(assembly.placed[last], assembly.skeleton.modules[last])
        for name, placed in assembly.placed.items():
            module = assembly.skeleton.modules[name]
            weight = placed.w()
            module.weight.data.copy_(weight[:, :, None, None] if is_pixels(module) else weight)
        known = {id(p) for p in [*assembly.fitted, *assembly.front]}
        known |= {id(module.weight) for module in assembly.skeleton.modules.values()}
        end = assembly.skeleton.modules[last]
        if told:
            known.add(id(end.bias))
        unknown += [p for p in model.parameters() if id(p) not in known]
        model.float()
        if told and assembly.front:  # nothing names the classes yet: the last layer is fitted along
            unknown += [end.weight, *([] if end.bias is None else [end.bias])]
        if unknown:
            theft.train(model, unknown, samples, REFIT[effort])
        _recalibrate(model, samples, assembly.rows)
        if told and not assembly.front:
            name_classes(model, end, samples)

    def score(self, recovered: Stolen, view: View, truth: Truth) -> Outcome:
        """Against the victim, the black box and no shield; and the share of channels that were placed rightly."""
        assert recovered.knowledge.architecture is not None  # noqa: S101
        found = theft.figures(recovered.model, truth, recovered.knowledge.architecture, recovered.samples)
        channels = recovered.assembly.agreement(truth)
        return Outcome(
            figures=[
                *found,
                Figure(
                    name="channels chained",
                    value=channels,
                    chance=0.0,
                    ceiling=1.0,
                    meaning="share of live channels that are the same one in every product that shares them",
                ),
                Figure(
                    name="products placed",
                    value=len(recovered.assembly.placed) / len(recovered.assembly.calls),
                    chance=0.0,
                    ceiling=1.0,
                    meaning="share of the network's products that replaying found a place for",
                ),
            ]
        )

    def control(self) -> Control:
        """A ReLU network under `tempo`, all layers out."""
        recorded = victims.relu_mlp().record("tempo")
        return Control(
            Evidence(recorded.views[0], recorded.knowledge, recorded.truth),
            "fidelity",
            0.95,
            "issue: fidelity above 95% for a ReLU MLP under tempo",
        )


def _recalibrate(model: nn.Module, samples: Samples, batch: int) -> None:
    """Running statistics of BatchNorm, over batches of the victim's size of the attacker's own samples."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches
    model.train()
    with torch.no_grad():
        for part in samples.inputs.split(batch):
            if len(part) == batch or len(samples) < batch:
                model(part)
    model.eval()

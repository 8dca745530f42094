"""How much of a model was stolen: fidelity, accuracy, membership inference, adversarial examples; with two floors.

*Black box* is what an attacker gets without any transcript: a network of the same architecture, trained on the
attacker's own samples with the victim's predictions for labels. *No shield* is the victim itself in the attacker's
hands. What a stolen model reaches means something between the two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.stats import ks_2samp
from torch import Tensor, nn
from torch.nn import functional as F

from tempo.audit.attack import Figure, NotApplicable
from tempo.audit.samples import Samples
from tempo.audit.truth import Truth
from tempo.recipes.models import logits

QUERIES = 512
"""Samples with which the black-box attacker queries the victim, at the most."""

STEPS = 150
"""Steps of training for the black-box surrogate: its loss on its samples is near nothing by then."""

ATTACKED = 128
"""Test samples that are turned into adversarial examples."""

BUDGET = 0.5
"""Largest change of an input by an adversarial example, in standard deviations of the inputs."""


def figures(stolen: nn.Module, truth: Truth, architecture: Callable[[], nn.Module], samples: Samples) -> list[Figure]:
    """Score a stolen model.

    Args:
        stolen: What the attacker assembled; runs on the victim's inputs.
        truth: Holds the victim, and samples it was and was not trained on.
        architecture: Builds a network of the victim's kind, for the black-box floor.
        samples: The attacker's own, with which the black-box floor queries the victim.

    Returns:
        Fidelity to the victim first, then accuracy, membership-inference advantage, transfer of adversarial examples;
        each with the black box as ``chance`` and no shield as ``ceiling``. Fidelity leaks from halfway between.

    Raises:
        NotApplicable: The victim or its samples are not at hand.
    """
    victim, members, test = truth.victim, truth.members, truth.test
    if victim is None or members is None or test is None:
        raise NotApplicable("a stolen model is scored against the victim: give its checkpoint with --truth")
    victim = victim.eval()
    box = surrogate(victim, architecture, samples.first(QUERIES))
    models = (stolen.float().eval(), box, victim)
    answers = [predictions(model, test.inputs) for model in models]
    fidelity = [_share(answer == answers[2]) for answer in answers]
    accuracy = [_share(answer == test.labels) for answer in answers]
    advantage = [_advantage(model, members, test) for model in models]
    transfer = [_transfer(model, victim, test.first(ATTACKED)) for model in models]
    return [
        Figure(
            name="fidelity",
            value=fidelity[0],
            leaks=(fidelity[1] + 1) / 2,
            chance=fidelity[1],
            ceiling=1.0,
            meaning="share of test inputs for which the stolen model gives the victim's answer",
        ),
        Figure(
            name="accuracy",
            value=accuracy[0],
            chance=accuracy[1],
            ceiling=accuracy[2],
            meaning="share of test inputs that the stolen model classifies rightly",
        ),
        Figure(
            name="membership advantage",
            value=advantage[0],
            chance=advantage[1],
            ceiling=advantage[2],
            meaning="how much better than guessing the stolen model's loss tells training samples from others",
        ),
        Figure(
            name="adversarial transfer",
            value=transfer[0],
            chance=transfer[1],
            ceiling=transfer[2],
            meaning="share of inputs that the victim gets wrong once they were changed to fool the stolen model",
        ),
    ]


def surrogate(victim: nn.Module, architecture: Callable[[], nn.Module], samples: Samples) -> nn.Module:
    """The black-box attacker's model: trained on ``samples`` as the victim labels them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = architecture()
    train(model, list(model.parameters()), Samples(samples.inputs, predictions(victim, samples.inputs)), STEPS)
    return model


def train(model: nn.Module, parameters: list[nn.Parameter], samples: Samples, steps: int) -> None:
    """Fit ``parameters`` to labelled samples by cross-entropy, with Adam; leaves the model in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    kept = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False).train()
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(parameters, 3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(samples), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(logits(model, samples.inputs[chosen]), samples.labels[chosen]).backward()
        optimizer.step()
    for parameter, required in zip(model.parameters(), kept, strict=True):
        parameter.requires_grad_(required)
    model.eval()


def predictions(model: nn.Module, inputs: Tensor) -> Tensor:
    """The class of each input."""
    with torch.no_grad():
        return torch.cat([logits(model, part).argmax(1) for part in inputs.split(256)])


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _advantage(model: nn.Module, members: Samples, others: Samples) -> float:
    """Largest difference of true and false positives over all thresholds on the loss (Yeom et al., CSF 2018)."""
    with torch.no_grad():
        losses = [
            F.cross_entropy(logits(model, part.inputs), part.labels, reduction="none").numpy()
            for part in (members, others)
        ]
    return float(ks_2samp(*losses).statistic)


def _transfer(model: nn.Module, victim: nn.Module, samples: Samples) -> float:
    """Share of samples that the victim gets right, and wrong after projected gradient ascent on ``model``'s loss."""
    right = predictions(victim, samples.inputs) == samples.labels
    if not bool(right.any()):
        raise NotApplicable("the victim gets no test sample right: no adversarial example can be scored")
    x, labels = samples.inputs[right], samples.labels[right]
    budget = BUDGET * float(x.std())
    change = torch.zeros_like(x)
    for _ in range(6):
        change.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(logits(model, x + change), labels), change)
        change = (change.detach() + budget / 3 * slope.sign()).clamp(-budget, budget)
    return _share(predictions(victim, x + change) != labels)

"""How much of a model was stolen: accuracy, fidelity, membership inference, adversarial examples; with two floors."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tempo.audit.attack import Figure
from tempo.audit.truth import Truth


def figures(stolen: nn.Module, truth: Truth, architecture: Callable[[], nn.Module]) -> list[Figure]:
    """Score a stolen model.

    Args:
        stolen: What the attacker assembled; runs on the victim's inputs.
        truth: Holds the victim, and samples it was and was not trained on.
        architecture: Builds a network of the victim's kind, for the black-box floor.

    Returns:
        Fidelity to the victim first, then accuracy, membership-inference advantage, transfer of adversarial examples.
    """
    raise NotImplementedError

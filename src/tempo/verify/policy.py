"""Which answers are checked."""

from __future__ import annotations

import secrets

import torch
from torch import Tensor


class Policy:
    """The setting ``verify``.

    Args:
        setting: ``off``, ``always`` or ``sample:P``.
    """

    def __init__(self, setting: str) -> None:
        kind, _, share = setting.partition(":")
        self.share = float(share) if share else {"off": 0.0, "always": 1.0}[kind]

    def chooses(self) -> bool:
        """Whether to check this call: by a coin that workers cannot know, where only a sample is checked."""
        return self.share == 1.0 or (self.share > 0.0 and secrets.SystemRandom().random() < self.share)

    def agree(self, found: Tensor, expected: Tensor) -> bool:
        """Whether sums of what came are those that were expected: integers, so exactly."""
        return torch.equal(found, expected)

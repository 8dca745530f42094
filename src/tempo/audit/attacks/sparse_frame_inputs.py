"""Sparse frames with known inputs: the covariance of ``x~`` gives the signs that weights alone leave open.

``Ṽᵀ X~ᵀ X~ Ṽ`` and ``V₀ᵀ C V₀``, with the covariance ``C`` of inputs that the public network has on data of the same
distribution, agree but for the signs. So they are found however dense the mask is; only blocks then give the change.
"""

from __future__ import annotations

import torch

from tempo.audit.attack import Control, Effort, NotApplicable
from tempo.audit.attacks.sparse_frame import Framed, SparseFrame, likely, one_round, single, targets
from tempo.audit.controls import basecase
from tempo.audit.controls.weak import small_mix
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers import frames
from tempo.audit.solvers.frames import as_taps
from tempo.audit.solvers.reference import plain_inputs
from tempo.audit.transcript import View


class SparseFrameInputs(SparseFrame):
    """Solves for one-round block masks from ``w~``, ``x~``, the public weight and data of the same distribution."""

    name = "sparse-frame-inputs"
    knows = frozenset({"architecture", "base", "data"})
    tries = (
        "As sparse-frame, with signs from the covariance of masked inputs beside that of the public network's inputs "
        "on similar data: finds masks however dense they are, and the private change where they have blocks."
    )

    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> Framed:
        """Of the newest call of products whose plain inputs can be computed.

        Raises:
            NotApplicable: There is none.
        """
        known = plain_inputs(view, knowledge)
        guesses = []
        for call, candidates in targets(view, knowledge, effort):
            if call.layer not in known or call.x.dim() != 2 or known[call.layer].shape[1:] != call.x.shape[1:]:
                continue
            starts = {}
            for name in likely(call.w, candidates):
                masked, base = as_taps(call.w), as_taps(candidates[name])
                inputs, _ = frames.sides(masked, base)
                ours, theirs = call.x.double(), known[call.layer].double()
                a = frames.by_covariance(inputs, ours.T @ ours, theirs.T @ theirs)
                starts[name] = frames.complete(masked, base, True, a, inputs.sparsity(a))
            name = max(starts, key=lambda each: starts[each].sparsity)
            guesses.append(one_round(call, candidates, name, starts[name]))
        if not guesses:
            raise NotApplicable("no product whose plain inputs are known comes from a public weight")
        return Framed(guesses)

    def control(self) -> Control:
        """Blocks of 16, inputs of uneven covariance."""
        generator = torch.Generator().manual_seed(0)
        mixture = torch.randn(96, 96, generator=generator) * torch.arange(1, 97) ** -0.5
        inputs = torch.randn(2 * 1024, 96, generator=generator) @ mixture.T
        evidence = basecase.record(single(96), drift=0.01, inputs=inputs, masks=small_mix(16))
        return Control(
            evidence, "delta error", 0.6, "measured before: 0.24 at width 384; √((d+m)(s−1)/(2dm)) gives 0.40 at 96"
        )

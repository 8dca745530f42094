"""Scheme `mix`: the preset of mixing for training from a secret initialisation. See `tempo.schemes.mixing`."""

from __future__ import annotations

from tempo.schemes.base import Traits
from tempo.schemes.mixing import LEAST_CLOAK, Mixing, Preset


class Mix(Mixing):
    """One round, a cloak, masks of features kept while the weight is."""

    name = "mix"
    traits = Traits(
        protects="resists workers without the base checkpoint, as far as the audit goes; spatial convolutions only as "
        "one mask in use for the whole run would (docs/schemes/mix.md)",
        public_base_preset="mix-tuned",
        known_breaks={
            "public-base": "one round of mixing gives a fine-tuned change away to a worker that knows the base "
            "checkpoint where its cloak is weak (error of the recovered change 0.41 without one, at blocks of 32;"
            " below 1 it leaks; docs/schemes/mix.md); mix-tuned is the preset for this",
            "spatial-convolution": "the taps of a kernel share their masks, so a worker can link the fresh masks of a "
            "convolution from step to step and undo the freshness; unfold=True masks taps and positions too "
            "(docs/schemes/mix.md)",
            "momentum-on-workers": "with update='worker', momentum goes out anew with its weight whenever masks are "
            "renewed, and that links new masks to old ones (0.69 of A, against 0.20 under trusted updates; "
            "docs/threat-model.md): count them as one mask for the whole run; momentum=0 does without",
        },
    )
    # Smaller blocks of features fall to sparse-direction searches and to frames of a known base, smaller blocks of rows
    # to pair tests with no prior knowledge at all.
    # Without a cloak, the step from one weight to the next (W~ − η dW~) links its fresh masks to those before.
    preset = Preset(rounds=1, cloak=LEAST_CLOAK, least_block=8, least_row_block=16)

"""Scheme `mix-tuned`: the preset of mixing for fine-tuning a public checkpoint. See `tempo.schemes.mixing`."""

from __future__ import annotations

from tempo.schemes.base import Traits
from tempo.schemes.mixing import LEAST_CLOAK, Mixing, Preset


class MixTuned(Mixing):
    """Two rounds, a cloak on ``W``, everything fresh at every call, output features divided over two operators."""

    name = "mix-tuned"
    traits = Traits(
        protects="resists workers that know the base checkpoint, as far as attacks tried before this code was written "
        "tell; not audited yet, see docs/schemes/mix.md",
        operators=2,
        fresh_every_call=True,
        public_base_preset="mix-tuned",
        known_breaks={
            "public-base": "whoever knows both the base checkpoint and the distribution of the data learns something "
            "of a fine-tuned change under any single-worker mask (docs/schemes/mix.md)",
        },
    )
    preset = Preset(rounds=2, cloak=LEAST_CLOAK, least_block=32, least_row_block=32, dense_below=384)

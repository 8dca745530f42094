"""Scheme `mix-tuned`: the preset of mixing for fine-tuning a public checkpoint. See `tempo.schemes.mixing`."""

from __future__ import annotations

from math import prod

from tempo.schemes.base import Traits
from tempo.schemes.mixing import LEAST_CLOAK, Mixing, Preset
from tempo.wire.messages import Conv, Product


class MixTuned(Mixing):
    """Two rounds, a cloak on ``W``, all fresh at every call, patches of convolutions, outputs over two operators."""

    name = "mix-tuned"
    traits = Traits(
        protects="resists workers that know the base checkpoint, as far as the audit goes; in part those that have "
        "data of the same distribution, too (docs/schemes/mix.md)",
        operators=2,
        fresh_every_call=True,
        unfolds=True,
        public_base_preset="mix-tuned",
        known_breaks={
            "public-base": "whoever knows both the base checkpoint and the distribution of the data learns something "
            "of a fine-tuned change under any single-worker mask (docs/schemes/mix.md)",
        },
    )
    preset = Preset(rounds=2, cloak=LEAST_CLOAK, least_block=32, least_row_block=32, dense_below=384)

    def refuses(self, product: Product, x: tuple[int, ...], w: tuple[int, ...]) -> str | None:
        """Spatial convolutions that cannot be unfolded, besides what is too narrow.

        All taps of a kernel share ``A`` and ``P``, which determines them once the base is known, whatever the blocks.
        """
        if isinstance(product, Conv) and prod(w[2:]) > 1:
            return "a spatial convolution in groups: one call gives its masks away to who knows the base"
        return super().refuses(product, x, w)

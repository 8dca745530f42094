"""The one settings schema, shared by `tempo.connect`, the recipe's ``[session]`` table and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tempo.errors import SettingsError, nearest

Seconds = Annotated[float, Meta(gt=0, le=86400)]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a session protects, places and sends."""

    scheme: str = "mix"
    """Name of the masking scheme; `tempo.schemes.names()` lists them."""

    base: Literal["auto", "public", "secret"] = "auto"
    """Whether workers may know nearly the weights that a model starts from. ``auto``: unless Tempo knows better, yes.
    Where they may, scheme `mix` gives way to `mix-tuned`. Scheme `split` sends frozen weights under
    ``public``; under ``auto`` it sends none and uses those that all workers loaded themselves. In a recipe ``secret``
    also makes them so."""

    placement: Literal["auto", "all"] = "auto"
    """``auto`` offloads what pays and is not too near inputs or labels; ``all`` everything that can be, for tests,
    audits and comparisons."""

    trusted: tuple[str, ...] = ()
    """Modules to keep in the trusted process, as shell patterns of their names (``vit.embeddings.*``)."""

    offload: tuple[str, ...] = ()
    """Layers that ``auto`` may send in spite of what they see, the first or the last say; ``trusted`` wins."""

    wire_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """What masked tensors travel as; ``auto`` follows the layer's compute dtype (float16 travels as float32). ``int8``:
    operands in 8 bits with a scale for every 32 elements, answers in bfloat16."""

    verify: Annotated[str, Meta(pattern=r"^(off|always|sample:(0(\.[0-9]+)?|1(\.0+)?))$")] = "always"
    """Which answers of workers are checked: ``always`` all; ``sample:P`` a share P, which finds faults and no liar;
    ``off`` none."""

    update: Literal["trusted", "worker", "auto"] = "trusted"
    """Where the weights of `Session.optimizer` are updated: ``trusted`` here; ``worker`` where they are multiplied, so
    that their gradients never travel, and masks of features stay as they are for ``rekey_rows`` rows; ``auto`` where
    fewer bytes travel, if that gives nothing away that ``trusted`` does not: under ``insecure-plain`` alone, so far."""

    divide_flops: Annotated[int, Meta(ge=1)] = 1 << 27
    """Products below this many FLOPs go whole to one worker: dividing them costs more round trips than it saves."""

    overlap: Literal["auto", 1, 2, 3, 4] = 1
    """In how many parts rows go to a worker, so that masks and checks of one part overlap with computing another;
    ``auto`` as the planner foresees, under ``placement="auto"``. Every part costs one more ``dW`` and round trip."""

    rekey_rows: Annotated[int, Meta(ge=1)] = 1 << 13
    """A weight's masks expire after serving this many rows, evaluation included: statistics live on reuse."""

    unfold: bool = False
    """Send spatial convolutions as patches times a matrix: masks then cover positions and kernel taps too, for as many
    times the bytes as the kernel has taps. Scheme `mix-tuned` always does."""

    memory_format: Literal["auto", "preserve"] = "auto"
    """How feature maps lie in memory: ``auto`` has channels last where that is faster and the model cannot notice;
    ``preserve`` as plain PyTorch would have them."""

    mix_block: Annotated[int, Meta(ge=1)] = 32
    """Schemes `mix` and `mix-tuned`: features that one block mixes, at least; layers with fewer stay trusted."""

    mix_row_block: Annotated[int, Meta(ge=1)] = 32
    """Rows that one block mixes, at least; random shield rows fill up where there are fewer."""

    mix_rounds: Annotated[int, Meta(ge=1, le=2)] | None = None
    """How often each axis is mixed; none: once under `mix`, twice under `mix-tuned`."""

    mix_condition: Annotated[float, Meta(ge=1, le=16)] = 1.0
    """Bound on a block's condition number; 1 for orthogonal blocks."""

    mix_cloak: Annotated[int, Meta(ge=0, le=1024)] | None = None
    """Rank of the secret matrix added to each weight; none: 16."""

    mix_shield_rows: Annotated[int, Meta(ge=0, le=4096)] = 0
    """Random rows of high energy to add to every part of the rows that a worker gets."""

    split_colluders: Annotated[int, Meta(ge=1, le=15)] = 1
    """Scheme `split`: how many operators may put together what their workers see; one more has to take part."""

    split_weight_bits: Annotated[int, Meta(ge=4, le=16)] = 9
    """Scheme `split`: bits of a public weight's integers. 9: products within 1% of float32's, and rows rounded so
    finely that a run follows plain LoRA on the same integers; 12: within 0.1%, rows less finely; 8: as 9 but for
    features with outliers, faster on workers (docs/schemes/split.md)."""

    local_workers: Annotated[int, Meta(ge=1, le=64)] = 1
    """How many workers to start on this machine when no address is given."""

    local_device: str = "cpu"
    """Device of local workers: ``cpu``, ``cuda`` or ``cuda:N``."""

    local_threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    """CPU threads of each local worker; 0 divides the cores among them."""

    transcript: str = ""
    """Folder where local workers record everything they receive or return."""

    identity: str = ""
    """Private key file for TLS; empty: ``identity.key`` in Tempo's configuration folder."""

    peers: str = ""
    """File or folder of trusted workers' certificates; empty: ``peers`` in Tempo's configuration folder. Those in a
    folder of an operator's name answer for that operator, and no others do."""

    connect_timeout: Seconds = 10.0
    """Seconds to wait for a worker to be reachable."""

    request_timeout: Seconds = 600.0
    """Seconds to wait for one answer before the worker counts as lost, however alive it seems."""

    stall_timeout: Annotated[float, Meta(ge=3, le=86400)] = 15.0
    """Seconds of silence, or of nothing reaching it, before a worker is lost: it sends a sign of life each second."""

    patience: Annotated[float, Meta(ge=0, le=604800)] = 30.0
    """Seconds to wait for a lost worker to come back where no other is left, before that is an error; 0: none is even
    sought."""

    insecure_no_tls: bool = False
    """Speak to remote workers in clear: masks still hold, authenticity does not."""

    insecure_small_blocks: bool = False
    """Allow blocks, rounds and cloaks that `mix` or `mix-tuned` refuse, since smaller ones are known to be undone."""

    insecure_record_truth: str = ""
    """Folder for the plain operands and masks behind every message, to score audits."""


def parse(values: Mapping[str, Any], where: str = "connect()") -> Settings:
    """Validate ``values`` into `Settings`.

    Args:
        values: Field names to values; dashes count as underscores.
        where: Where the values come from, for the error.

    Raises:
        SettingsError: A field is unknown (the nearest valid one is named) or its value does not fit.
    """
    fields = {name.replace("-", "_"): value for name, value in values.items()}
    for name in fields:
        if name not in Settings.__struct_fields__:
            raise SettingsError(f"{where}: unknown setting {name!r}; {nearest(name, Settings.__struct_fields__)}")
    try:
        return msgspec.convert(fields, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{where}: {error}") from None

"""Records the plain counterparts of everything a worker receives, so that an audit can score its attacks. Insecure."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tempo.engine.batch import Posted

VERSION = 1


class TruthRecorder:
    """Writes ``DIR/{session}/worker{n}/{step:06d}-{sequence:08d}-{layer:04d}-{operation}.safetensors``.

    The names are those of the worker's transcript of the same message. Files hold the plain ``x``, ``w``, ``y``,
    ``g``, ``dx`` and the masks (``l_permutation``, ``l_scale``, ... ``a_...``, ``p_...``). ``names.json`` says which
    layer each number stands for.
    """

    def __init__(self, folder: str, session: str, scheme: str) -> None:
        self._folder = Path(folder) / session
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._session = session
        self._schemes: list[str] = []
        self._write_manifest(scheme)
        self._names: dict[int, str] = {}

    def masked_by(self, scheme: str) -> None:
        """Note a scheme that a model is protected by: a preset, perhaps, of the one that the settings name."""
        if scheme not in self._schemes:
            self._schemes.append(scheme)
            self._write_manifest(", ".join(self._schemes))

    def _write_manifest(self, scheme: str) -> None:
        manifest = {"version": VERSION, "session": self._session, "scheme": scheme}
        (self._folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    def named(self, layer: int, name: str) -> None:
        """Note the name behind a layer's number."""
        if self._names.get(layer) != name:
            self._names[layer] = name
            (self._folder / "names.json").write_text(json.dumps(self._names, indent=2) + "\n")

    def record(self, posted: Posted, operation: str, tensors: dict[str, Tensor]) -> None:
        """Write one message's plain tensors and masks."""
        folder = self._folder / f"worker{posted.worker}"
        folder.mkdir(exist_ok=True)
        name = f"{posted.step:06d}-{posted.sequence:08d}-{posted.layer:04d}-{operation}.safetensors"
        plain = {key: value.detach().to(torch.device("cpu")).contiguous() for key, value in tensors.items()}
        save_file(plain, folder / name)

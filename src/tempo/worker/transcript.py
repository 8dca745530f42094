"""Transcripts: everything that one session sent here or got from here, as an honest-but-curious operator has it."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, final

import msgspec
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import tempo
from tempo.wire.messages import Backward, Fetch, Forward, Store, Update
from tempo.worker.refusal import Refusal

VERSION: Final = 1
_FORMAT: Final = {
    "file": "{step:06d}-{sequence:08d}-{layer:04d}-{operation}.safetensors",
    "sequence": "the request's number, in the order of sending; unique over the workers of a session",
    "layer": "an opaque number chosen by the trusted side",
    "operation": {
        "store": "w received, kept as weight, and with it its gradient and what optimizers keep of it, if sent",
        "forward": "x received (kept as operand unless 0), y returned",
        "backward": "g received; dx (from weight) and dw (from operand) returned, as wanted, or (accumulate) dw not "
        "returned but added to the weight's gradient",
        "update": "weight changed by scale times its gradient; w as it is now",
        "fetch": "w, its gradient, what optimizers keep of it or the gradient's norm returned, as wanted",
    },
    "metadata": {
        "all": "weight, worker (host:process)",
        "forward, backward": "operand, product (JSON)",
        "backward": "accumulate (true or false)",
        "update": "rule (JSON), scale",
    },
}


@final
class Transcript:
    """Writes one session's messages to a folder of its own."""

    def __init__(self, root: Path, session: str) -> None:
        self._folder = root / session
        self._folder.mkdir(parents=True, exist_ok=True)
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        manifest = {
            "version": VERSION,
            "tempo": tempo.__version__,
            "session": session,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "format": _FORMAT,
        }
        path = self._folder / "manifest.json"
        if not path.exists():  # several workers of one session may share the folder
            path.write_text(json.dumps(manifest, indent=2) + "\n")

    def record(self, message: Store | Forward | Backward | Update | Fetch, tensors: dict[str, Tensor]) -> None:
        """Write what ``message`` brought and what it was answered with."""
        operation = type(message).__name__.lower()
        name = f"{message.step:06d}-{message.id:08d}-{message.layer:04d}-{operation}.safetensors"
        metadata = {"weight": str(message.weight), "worker": self._worker}
        if isinstance(message, Forward | Backward):
            metadata["operand"] = str(message.operand)
            metadata["product"] = msgspec.json.encode(message.product).decode()
        if isinstance(message, Backward):
            metadata["accumulate"] = str(message.accumulate).lower()
        if isinstance(message, Update):
            metadata["rule"] = msgspec.json.encode(message.rule).decode()
            metadata["scale"] = str(message.scale)
        tensors = {key: tensor.cpu() for key, tensor in tensors.items()}
        partial = self._folder / f".{name}"
        try:
            save_file(tensors, partial, metadata)
            partial.rename(self._folder / name)
        except (OSError, SafetensorError) as error:
            raise Refusal("failed", f"the transcript {self._folder / name} cannot be written: {error}") from error

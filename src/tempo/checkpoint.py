"""Checkpoints that survive crashes, full disks and damage: a folder per step, written whole or not at all.

A checkpoint is safetensors files plus JSON, never pickle, and never holds a key: a resumed run draws new ones. All
reading and writing goes through `_write` and `_read`, so that encryption has one place to wrap.

    FOLDER/step-00000120/model.safetensors      tensors, one file per name given to `save`
                         state.json             everything that is not a tensor
                         manifest.json          size and SHA-256 of the others, written last
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, final

import msgspec
import numpy as np
import safetensors
import torch
from msgspec import Meta
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from tempo.errors import CheckpointError

_FORMAT: Final = 1
_FOLDER: Final = re.compile(r"^step-(\d{8,})$")
_MANIFEST: Final = "manifest.json"
_STATE: Final = "state.json"
_UNFINISHED: Final = ".unfinished-"
_FileName = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]*\.(safetensors|json)$")]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int
    sha256: str


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    step: int
    files: dict[_FileName, _File]


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    damaged: list[str] = field(default_factory=list)
    """Newer checkpoints that had to be passed over, and what is wrong with them."""


@final
class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Where they lie; created when the first is saved.
        keep: How many to keep; older ones are removed after a newer one is safely on disk.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self._keep = keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, damaged or not, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for entry in self.folder.iterdir() if (match := _FOLDER.match(entry.name)))

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and return its folder. Whatever fails, the earlier ones stay as they were.

        Args:
            step: Steps completed.
            tensors: A safetensors file for every name.
            state: What is not a tensor; must be JSON.

        Raises:
            CheckpointError: It could not be written, because the disk is full, say.
        """
        target = self._path(step)
        unfinished = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
            _write_all(unfinished, step, tensors, state)
            _put_in_place(unfinished, target)
            _sync(self.folder)
        except OSError as error:
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
            left = [f"step {other}" for other in self.steps() if other != step]
            raise CheckpointError(
                f"could not write the checkpoint of step {step} to {self.folder}: {error.strerror or error}; "
                + (f"the one of {left[-1]} is intact" if left else "there is no earlier one")
                + ". Make room, or choose another folder, and try again"
            ) from error
        self._remove_unfinished()
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self._path(old), ignore_errors=True)
        return target

    def load(self, step: int | None = None) -> Checkpoint:
        """Read the newest whole checkpoint, or the one of ``step``.

        Raises:
            CheckpointError: There is none, or the one asked for is damaged.
        """
        if step is not None:
            return read(self._path(step))
        damaged: list[str] = []
        for candidate in reversed(self.steps()):
            try:
                found = read(self._path(candidate))
            except CheckpointError as error:
                damaged.append(str(error))
            else:
                return Checkpoint(found.path, found.step, found.tensors, found.state, damaged)
        if damaged:
            raise CheckpointError("no checkpoint is whole: " + "; ".join(damaged))
        raise CheckpointError(f"no checkpoint in {self.folder}")

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _remove_unfinished(self) -> None:
        for leftover in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def read(path: Path) -> Checkpoint:
    """Read the checkpoint in folder ``path``, every byte verified against its manifest."""
    try:
        manifest = msgspec.json.decode(_read(path / _MANIFEST), type=_Manifest)
        if manifest.format != _FORMAT:
            raise CheckpointError(f"{path} has format {manifest.format}; this version reads {_FORMAT}")
        tensors: dict[str, dict[str, Tensor]] = {}
        state: dict[str, Any] = {}
        for name, file in manifest.files.items():
            content = _read(path / name)
            if len(content) != file.size or hashlib.sha256(content).hexdigest() != file.sha256:
                raise CheckpointError(f"{path} is damaged: {name} is not what its manifest says")
            if name == _STATE:
                state = json.loads(content)
            else:
                tensors[name.removesuffix(".safetensors")] = tensors_from_bytes(content)
    except OSError as error:
        what = Path(error.filename or path).name
        raise CheckpointError(f"{path} is not a whole checkpoint: {what}: {error.strerror or error}") from None
    except (msgspec.DecodeError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return Checkpoint(path, manifest.step, tensors, state)


# --- model, optimizer and generators as tensors and JSON ----------------------------------------------------------


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Split a nested ``state_dict`` into tensors by name and JSON that refers to them.

    Handles dicts (with keys of any plain type), lists, tuples, tensors, None, bool, int, str and any float, exactly.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _to_json(state, "", tensors)


def unflatten(tensors: Mapping[str, Tensor], structure: Any) -> Any:
    """Undo `flatten`."""
    if isinstance(structure, list):
        return [unflatten(tensors, item) for item in structure]
    if not isinstance(structure, dict):
        return structure
    match structure:
        case {"$tensor": name}:
            return tensors[name]
        case {"$tuple": items}:
            return tuple(unflatten(tensors, item) for item in items)
        case {"$float": text}:
            return float(text)
        case {"$dict": pairs}:
            return {unflatten(tensors, key): unflatten(tensors, value) for key, value in pairs}
    return {key: unflatten(tensors, value) for key, value in structure.items()}


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy ``tensors`` into ``model``.

    Raises:
        CheckpointError: They belong to another model; names the first parameter that differs. ``model`` is unchanged.
    """
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise CheckpointError(f"{source} is of another model: it has no {name!r}, here {tuple(tensor.shape)}")
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)} there, {tuple(tensor.shape)} here"
            raise CheckpointError(f"{source} is of another model: {name!r} is {shapes}")
    for name, tensor in tensors.items():
        if name not in own:
            raise CheckpointError(f"{source} is of another model: it has {name!r} {tuple(tensor.shape)}, this one not")
    model.load_state_dict(dict(tensors))


def generators() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, for `flatten`. None of them makes keys."""
    numpy_state = np.random.get_state(legacy=False)
    inner = dict(numpy_state["state"])
    inner["key"] = torch.from_numpy(inner["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": inner},
        "torch": torch.get_rng_state(),
    }


def restore_generators(state: Mapping[str, Any]) -> None:
    """Undo `generators`."""
    random.setstate(state["python"])
    inner = dict(state["numpy"]["state"])
    inner["key"] = inner["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": inner})
    torch.set_rng_state(state["torch"])


def _to_json(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    match value:
        case Tensor():
            name = path
            while name in tensors:  # keys with slashes
                name += "'"
            tensors[name] = value
            return {"$tensor": name}
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"$float": repr(value)}
        case tuple():
            return {"$tuple": [_to_json(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
        case list():
            return [_to_json(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        case dict() if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _to_json(item, f"{path}/{key}", tensors) for key, item in value.items()}
        case dict():
            pairs = enumerate(value.items())
            return {
                "$dict": [
                    [_to_json(key, f"{path}/{i}/key", tensors), _to_json(item, f"{path}/{i}", tensors)]
                    for i, (key, item) in pairs
                ]
            }
    raise CheckpointError(f"a checkpoint cannot hold the {type(value).__name__} at {path or 'the top'}")


# --- files --------------------------------------------------------------------------------------------------------


def _write_all(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    files = {_STATE: _write(folder / _STATE, json.dumps(state, allow_nan=False).encode())}
    for name, group in tensors.items():
        file = f"{name}.safetensors"
        files[file] = _write(folder / file, tensors_to_bytes(_separate(group)))
    _write(folder / _MANIFEST, msgspec.json.encode(_Manifest(_FORMAT, step, files)))
    _sync(folder)


def _put_in_place(unfinished: Path, target: Path) -> None:
    if not target.exists():
        unfinished.rename(target)
        return
    replaced = unfinished.with_name(f"{unfinished.name}-replaced")
    target.rename(replaced)
    try:
        unfinished.rename(target)
    except OSError:
        replaced.rename(target)
        raise


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors with storage of their own, as safetensors wants: tied weights are written twice."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _write(path: Path, content: bytes) -> _File:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return _File(len(content), hashlib.sha256(content).hexdigest())


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _sync(folder: Path) -> None:
    """Make renames and new names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Running a trained model: what evaluation, prediction and the training loop share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tempo
from tempo import checkpoint
from tempo.checkpoint import Checkpoint, CheckpointStore, load_model
from tempo.errors import CheckpointError, DataError
from tempo.recipes import recipe as recipes
from tempo.recipes import table
from tempo.recipes.data import Format, Images
from tempo.recipes.models import logits
from tempo.recipes.recipe import Recipe

if TYPE_CHECKING:
    from tempo.session import Session

FOLDER = "checkpoints"
"""Where the checkpoints lie in a run's folder."""


@dataclass(frozen=True)
class Trained:
    """A model from a checkpoint, with what belongs to it."""

    model: nn.Module
    recipe: Recipe
    format: Format
    checkpoint: Checkpoint


@contextmanager
def protected(
    model: nn.Module, settings: recipes.Session, plain: bool = False, trusted: Sequence[str] = ()
) -> Iterator[Session | None]:
    """Run ``model`` through workers while inside.

    Args:
        model: The model.
        settings: The recipe's.
        plain: Leave it alone instead, and yield None.
        trusted: Layers to keep here besides those of the settings.
    """
    if plain:
        yield None
        return
    with tempo.connect(*settings.workers, settings=settings) as session:
        session.protect(model, trusted=trusted)
        yield session


def find(path: Path) -> Checkpoint:
    """The checkpoint that a person means by ``path``: a checkpoint, a folder of checkpoints or a run's folder."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a checkpoint, or the folder of a run")
    if (path / "manifest.json").exists():
        return checkpoint.read(path)
    return CheckpointStore(path / FOLDER if (path / FOLDER).is_dir() else path).load()


def load(path: Path, overrides: Sequence[str] = ()) -> Trained:
    """Build the model of the checkpoint at ``path`` and load its weights, ready to evaluate.

    Args:
        path: See `find`.
        overrides: ``table.key=value`` texts over the recipe in the checkpoint.
    """
    found = find(path)
    recipe = recipe_of(found, overrides)
    form = format_of(found)
    model = recipe.model.build(form.channels, form.size, len(form.classes))
    load_model(model, found.tensors.get("model", {}), str(found.path))
    return Trained(model.eval(), recipe, form, found)


def recipe_of(found: Checkpoint, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that ``found`` was trained by.

    Of its session only the layers to keep trusted are taken over: a checkpoint may be somebody else's, who must not get
    to choose where inputs go and under which mask.
    """
    values = dict(found.state.get("recipe", {}))
    values["session"] = {"trusted": values.get("session", {}).get("trusted", [])}
    return recipes.parse(table.override(values, overrides), str(found.path))


def format_of(found: Checkpoint) -> Format:
    """The images that the model in ``found`` expects."""
    try:
        return msgspec.convert(found.state.get("format"), Format)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{found.path} is not of a training run: format: {error}") from None


def evaluate(
    model: nn.Module, images: Images, form: Format, batch_size: int, stop: Callable[[], bool] = lambda: False
) -> tuple[float, float]:
    """Mean loss and accuracy of ``model`` on ``images``; breaks off when ``stop`` says so."""
    training = model.training
    model.eval()
    loss, right, done = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            labels = images.labels[start : start + batch_size]
            scores = logits(model, form.numbers(images.images[start : start + batch_size]))
            loss += F.cross_entropy(scores, labels, reduction="sum").item()
            right += int((scores.argmax(1) == labels).sum())
            done += len(labels)
            if stop():
                break
    model.train(training)
    return loss / done, right / done


def picture(file: Path, form: Format) -> Tensor:
    """Images from ``file`` as bytes N×C×H×W of the format's channels: PNG, JPEG and the like, or a ``.npy`` array.

    An array is H×W, H×W×C or N×H×W×C, of bytes or of numbers from 0 to 1.
    """
    try:
        if file.suffix == ".npy":
            return _from_array(np.load(file, allow_pickle=False), file, form)
        from PIL import Image

        with Image.open(file) as image:
            scaled = image.convert("L" if form.channels == 1 else "RGB").resize((form.size, form.size))
        return _from_array(np.asarray(scaled), file, form)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot read as an image: {error}") from None


def _from_array(array: np.ndarray, file: Path, form: Format) -> Tensor:
    if np.issubdtype(array.dtype, np.floating) and array.size and array.min() >= 0 and array.max() <= 1:
        array = (array * 255).round().astype(np.uint8)
    if array.ndim == 2 or (array.ndim == 3 and form.channels == 1 and array.shape[-1] != 1):
        array = array[..., None]
    if array.ndim == 3:
        array = array[None]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != form.channels or not array.size:
        expected = f"N×H×W×{form.channels} bytes (or numbers from 0 to 1)"
        raise DataError(f"{file}: expected {expected}, found {array.dtype} {array.shape}")
    return torch.from_numpy(array.copy()).permute(0, 3, 1, 2)

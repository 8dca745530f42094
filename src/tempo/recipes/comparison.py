"""After a protected run: the same training in plain, what a worker received, and a picture of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import msgspec
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import tempo
from tempo.checkpoint import CheckpointStore
from tempo.errors import TempoError
from tempo.recipes import data, inference, metrics
from tempo.recipes import recipe as recipes
from tempo.recipes.data import Images
from tempo.recipes.inference import FOLDER, Trained
from tempo.recipes.metrics import Step
from tempo.recipes.models import logits
from tempo.recipes.recipe import Recipe
from tempo.recipes.running import Outcome
from tempo.recipes.train import INITIAL, train

_SHOWN: Final = 5
_BATCH: Final = 8
_KNOWN: Final = 1000
"""Training images that the linear reader may see the plain operands of."""


@dataclass(frozen=True)
class Seen:
    """Test images (bytes), their share of the first operand that leaves the process, and what can be read from it."""

    scheme: str
    images: Tensor
    plain: Tensor
    received: Tensor
    read_plain: Tensor
    read_received: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image's operand: rows×features."""
        return tuple(self.plain.shape[1:])


def compare(recipe: Recipe, console: Console, outcome: Outcome, *, resume: bool = False) -> Outcome:
    """Train in plain from the same weights, print how far the losses are apart, and draw ``report.png``."""
    from tempo.recipes.picture import draw

    folder = outcome.folder
    plain = recipes.changed(
        recipe, {"run": {"out": str(folder / "plain"), "checkpoint_every": 0, "compare_plain": False}}, "comparison"
    )
    again = resume and (folder / "plain" / FOLDER).is_dir()
    start = CheckpointStore(folder / INITIAL)
    initial = start.load().tensors["model"] if start.steps() else None
    other = train(plain, console, resume=again, plain=True, title="the same in plain", initial=initial)
    if other.signal:
        return other
    absolute, relative, step = largest_difference(folder, folder / "plain")
    console.print(
        f"largest difference of a step's loss to plain training: {absolute:.1e} ({relative:.1e} of it, step {step}); "
        f"test accuracy {outcome.accuracy:.1%} protected, {other.accuracy:.1%} plain",
        soft_wrap=True,
        highlight=False,
    )
    trained = inference.load(folder)
    source = data.load(recipe.data.source, recipe.data.train_limit, recipe.data.test_limit)
    file = draw(folder, seen_by_a_worker(trained, recipe.session, source))
    console.print(f"picture: {file}", soft_wrap=True, highlight=False)
    return outcome


def losses(folder: Path) -> list[float]:
    """The loss of every step of the run in ``folder``."""
    return [record.loss for record in metrics.read(folder) if isinstance(record, Step)]


def largest_difference(folder: Path, plain: Path) -> tuple[float, float, int]:
    """The largest difference between the losses of two runs: absolute, relative to the plain loss there, and where."""
    pairs = list(zip(losses(folder), losses(plain)))
    step = max(range(len(pairs)), key=lambda i: abs(pairs[i][0] - pairs[i][1]))
    absolute = abs(pairs[step][0] - pairs[step][1])
    return absolute, absolute / max(abs(pairs[step][1]), 1e-12), step + 1


def seen_by_a_worker(trained: Trained, settings: recipes.Session, source: data.Source) -> Seen:
    """Run a few test images through a recording local worker, and try to read them back from what it received.

    The reader is a linear map from operand to pixels, fitted on plain operands of training images. It shows whether an
    operand can be read *as it is*; it undoes no mask. That is what `tempo audit` will be for.
    """
    model, form = trained.model, trained.format
    batch = source.test.first(_BATCH)
    with TemporaryDirectory(prefix="tempo-transcript-") as folder:
        settings = msgspec.structs.replace(
            settings, workers=(), local_workers=1, transcript=folder, insecure_record_truth=""
        )
        with tempo.connect(settings=settings) as session, torch.no_grad():
            session.protect(model)
            logits(model, form.numbers(batch.images))
            scheme = session.summary().models[0].scheme.name
            session.unprotect(model)
        files = sorted(Path(folder).glob("*/*-forward.safetensors"))
        if not files:
            raise TempoError("the worker received nothing: the placement keeps all layers trusted")
        received = load_file(files[0])["x"].float()

    inputs = _operands(model, form.numbers(batch.images))
    layer = next((name for name, operand in inputs.items() if operand.shape[1:] == received.shape[1:]), None)
    if layer is None:
        raise TempoError(f"no layer has an operand like the first that the worker received, {tuple(received.shape)}")
    plain = inputs[layer]
    received = received[: len(plain)]  # a scheme may add rows
    received = (received - received.mean()) / received.std() * plain.std() + plain.mean()

    known = source.train.first(_KNOWN)
    reader = _LinearReader(_operands(model, form.numbers(known.images))[layer], known)
    return Seen(
        scheme,
        batch.images[:_SHOWN],
        plain.reshape(_BATCH, -1, plain.shape[1])[:_SHOWN],
        received.reshape(_BATCH, -1, plain.shape[1])[:_SHOWN],
        reader.read(plain, _BATCH)[:_SHOWN],
        reader.read(received, _BATCH)[:_SHOWN],
    )


class _LinearReader:
    """Ridge regression from the operands of an image to its pixels, in dual form: many features, few images."""

    def __init__(self, operands: Tensor, images: Images) -> None:
        features = operands.reshape(len(images), -1)
        pixels = images.images.reshape(len(images), -1).float() / 255
        self._centre, self._grey, self._shape = features.mean(0), pixels.mean(0), images.images.shape[1:]
        centred = features - self._centre
        products = centred @ centred.T
        ridge = 1e-2 * products.diagonal().mean() * torch.eye(len(images))
        self._weights = centred.T @ torch.linalg.solve(products + ridge, pixels - self._grey)

    def read(self, operands: Tensor, count: int) -> Tensor:
        pixels = (operands.reshape(count, -1) - self._centre) @ self._weights + self._grey
        read: Tensor = pixels.clamp(0, 1).reshape(count, *self._shape)
        return read


def _operands(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each linear or convolutional layer is given for ``images``: rows×features, or N×C×…."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Sequence[Tensor]) -> None:
            operand = inputs[0].detach()
            found.setdefault(name, operand.flatten(0, -2) if isinstance(module, nn.Linear) else operand)

        return hook

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        logits(model, images)
    for handle in hooks:
        handle.remove()
    return found

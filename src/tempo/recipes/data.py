"""Images by name of their source: bundled, from the folder ``$TEMPO_DATA``, or through Hugging Face ``datasets``.

A new source is one function and a line in `SOURCES`. Images stay bytes in memory; a batch becomes numbers when it is
used.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tempo.errors import DataError, nearest

Bytes = NDArray[np.uint8]

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Images:
    """Images as bytes, N×C×H×W, and the number of the class of each."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, limit: int) -> Images:
        """The first ``limit`` of them; 0: all."""
        return Images(self.images[:limit], self.labels[:limit]) if limit else self


class Format(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model expects of an image. Kept in checkpoints, so that predicting needs no data set."""

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]

    def numbers(self, images: Tensor) -> Tensor:
        """Bytes N×C×H×W to normalised float32 of the expected size."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        x = (images.float() / 255 - mean) / std
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        return x


@dataclass(frozen=True)
class Source:
    """A data set: training and test images, and the names of the classes."""

    train: Images
    test: Images
    classes: tuple[str, ...]

    def format(self, resize: int = 0) -> Format:
        """Normalisation by statistics of the training images, and their size unless ``resize`` gives another."""
        pixels = self.train.images[:10_000].float() / 255
        mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp_min(1e-3)
        channels, size = self.train.images.shape[1:3]
        return Format(channels, resize or size, tuple(mean.tolist()), tuple(std.tolist()), self.classes)


def load(name: str, train_limit: int = 0, test_limit: int = 0) -> Source:
    """Load a source by name.

    Raises:
        DataError: The name is unknown, or the data is neither in ``$TEMPO_DATA`` nor to be had.
    """
    if name not in SOURCES:
        raise DataError(f"unknown data source {name!r}; {nearest(name, SOURCES)}")
    source = SOURCES[name]()
    return Source(source.train.first(train_limit), source.test.first(test_limit), source.classes)


@final
class Order:
    """Which images come when: a function of (seed, epoch), and a position that a checkpoint can restore."""

    def __init__(self, images: int, batch_size: int, seed: int) -> None:
        if batch_size > images:
            raise DataError(f"batch_size {batch_size} is more than the {images} training images there are")
        self._images = images
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0
        self._batch = 0

    def batch(self) -> Tensor:
        """Indices of the current batch."""
        order = torch.randperm(self._images, generator=generator("order", self._seed, self._epoch))
        return order[self._batch * self._batch_size :][: self._batch_size]

    def randomness(self) -> torch.Generator:
        """The generator for augmenting the current batch."""
        return generator("augment", self._seed, self._epoch, self._batch)

    def advance(self) -> None:
        """Go on to the next batch; an epoch's incomplete last one is dropped."""
        self._batch += 1
        if (self._batch + 1) * self._batch_size > self._images:
            self._epoch, self._batch = self._epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position."""
        self._epoch, self._batch = state["epoch"], state["batch"]


def generator(*labels: object) -> torch.Generator:
    """A generator for data (never for masks) that depends on nothing but ``labels``."""
    digest = hashlib.sha256(repr(labels).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def augment(images: Tensor, kinds: tuple[Literal["flip", "crop"], ...], randomness: torch.Generator) -> Tensor:
    """Mirror and shift images at random."""
    count, _, height, width = images.shape
    if "flip" in kinds:
        mirrored = torch.rand(count, generator=randomness) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    if "crop" in kinds:
        margin = max(1, height // 8)
        padded = F.pad(images, (margin,) * 4).permute(0, 2, 3, 1)
        top, left = torch.randint(0, 2 * margin + 1, (2, count, 1), generator=randomness)
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        images = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return images.contiguous()


# --- sources ------------------------------------------------------------------------------------------------------


def _digits() -> Source:
    """Scikit-learn's 1,797 handwritten digits of 8×8 pixels, one in five of them for testing."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = (bundle.images * (255 / 16)).astype(np.uint8)[:, None]
    order = torch.randperm(len(images), generator=generator("digits")).numpy()
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return Source(
        _images(images[train], bundle.target[train], 10, "digits"),
        _images(images[test], bundle.target[test], 10, "digits"),
        tuple(str(digit) for digit in range(10)),
    )


def _fashion_mnist() -> Source:
    """Zalando's 70,000 grey images of 28×28 pixels."""
    folder = _local("fashion-mnist")
    if folder is None:
        hint = "the four files *-ubyte.gz in a folder fashion-mnist"
        return _hub("zalando-datasets/fashion_mnist", "image", "label", _FASHION, "fashion-mnist", hint)
    train, test = (
        _images(
            _idx(folder / f"{part}-images-idx3-ubyte.gz", 3)[:, None],
            _idx(folder / f"{part}-labels-idx1-ubyte.gz", 1),
            10,
            str(folder),
        )
        for part in ("train", "t10k")
    )
    return Source(train, test, _FASHION)


def _cifar10() -> Source:
    """60,000 colour images of 32×32 pixels, or a subset of them."""
    if (folder := _local("cifar-10-batches-bin")) is not None:
        train = _cifar_records([folder / f"data_batch_{number}.bin" for number in range(1, 6)])
        return Source(train, _cifar_records([folder / "test_batch.bin"]), _CIFAR)
    if (file := _local("cifar10_subset.npz")) is not None:
        return _npz(file)
    hint = "the folder cifar-10-batches-bin (CIFAR-10's binary version) or cifar10_subset.npz"
    return _hub("uoft-cs/cifar10", "img", "label", _CIFAR, "cifar10", hint)


SOURCES: dict[str, Callable[[], Source]] = {"digits": _digits, "fashion-mnist": _fashion_mnist, "cifar10": _cifar10}


# --- formats ------------------------------------------------------------------------------------------------------


def _local(name: str) -> Path | None:
    folder = os.environ.get("TEMPO_DATA")
    path = Path(folder) / name if folder else None
    return path if path is not None and path.exists() else None


def _images(images: Bytes, labels: NDArray[Any], classes: int, where: str) -> Images:
    """Check shapes and labels, and turn into tensors."""
    if images.ndim != 4 or images.shape[2] != images.shape[3] or images.dtype != np.uint8:
        raise DataError(f"{where}: expected square images as bytes, N×C×H×W, found {images.dtype} {images.shape}")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{where}: {len(images)} images but labels of shape {labels.shape}")
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"{where}: labels must be 0 to {classes - 1}, one for every image")
    return Images(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)))


def _idx(file: Path, axes: int) -> Bytes:
    """The IDX format: zero, zero, type 8 (bytes), number of axes, sizes big-endian, bytes."""
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{file}: cannot read: {error}") from None
    start = 4 + 4 * axes
    if len(content) < start or content[:4] != bytes((0, 0, 8, axes)):
        raise DataError(f"{file}: not an IDX file of bytes with {axes} axes")
    shape = tuple(np.frombuffer(content, ">u4", axes, 4).tolist())
    if len(content) - start != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{file}: holds {len(content) - start} bytes for shape {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _cifar_records(files: list[Path]) -> Images:
    """CIFAR-10's binary version: a label byte and 3×32×32 bytes, over and over."""
    records = []
    for file in files:
        try:
            content = np.frombuffer(file.read_bytes(), np.uint8)
        except OSError as error:
            raise DataError(f"{file}: cannot read: {error.strerror}") from None
        if not len(content) or len(content) % 3073:
            raise DataError(f"{file}: {len(content)} bytes is not a number of records of 3073 bytes")
        records.append(content.reshape(-1, 3073))
    joined = np.concatenate(records)
    return _images(joined[:, 1:].reshape(-1, 3, 32, 32), joined[:, 0], 10, str(files[0].parent))


def _npz(file: Path) -> Source:
    """NumPy arrays x_train, y_train, x_test, y_test (N×H×W×C bytes) and classes."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("x_train", "y_train", "x_test", "y_test", "classes")}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file}: cannot read: {error}") from None
    classes = tuple(str(name) for name in found["classes"])
    train, test = (
        _images(found[f"x_{part}"].transpose(0, 3, 1, 2), found[f"y_{part}"], len(classes), str(file))
        for part in ("train", "test")
    )
    return Source(train, test, classes)


def _hub(repository: str, image: str, label: str, classes: tuple[str, ...], name: str, hint: str) -> Source:
    """A data set from the Hugging Face hub, or from its local cache."""
    folder = os.environ.get("TEMPO_DATA") or "not set"
    put = f"put {hint} into the folder that TEMPO_DATA names (now: {folder})"
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"{name} is not here: {put}, or install tempo-train[hub] to download it, or use source = 'digits'"
        ) from None
    try:
        bundle = load_dataset(repository)
    except Exception as error:  # datasets raises whatever its many transports raise
        raise DataError(f"{name} is not here and could not be downloaded ({error}): {put}") from error
    train, test = (
        _images(
            _channels_first(np.stack([np.asarray(picture, dtype=np.uint8) for picture in bundle[part][image]])),
            np.asarray(bundle[part][label]),
            len(classes),
            repository,
        )
        for part in ("train", "test")
    )
    return Source(train, test, classes)


def _channels_first(images: Bytes) -> Bytes:
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo.errors import DataError
from tempo.recipes import data
from tempo.recipes.data import Format, Order, augment, generator


def test_digits_come_without_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEMPO_DATA", raising=False)
    source = data.load("digits", train_limit=100)
    assert source.train.images.shape == (100, 1, 8, 8)
    assert len(source.test) == 359
    assert set(source.test.labels.tolist()) == set(range(10))
    numbers = source.format().numbers(source.train.images)
    assert abs(numbers.mean()) < 1e-5
    assert numbers.std() == pytest.approx(1, rel=1e-4)
    assert torch.equal(data.load("digits").test.images, source.test.images)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_missing_data_says_what_to_put_where(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPO_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=rf"put .*{tmp_path}.*tempo-train\[hub\]"):
        data.load(name)


def test_an_unknown_source_names_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'cifar10'"):
        data.load("cifar-10")


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEMPO_DATA", str(tmp_path))
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for part, count in (("train", 12), ("t10k", 5)):
        images = np.arange(count * 16).reshape(count, 4, 4)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(count) % 10))
    return folder


def test_fashion_mnist_from_a_folder(fashion: Path) -> None:
    source = data.load("fashion-mnist")
    assert source.train.images.shape == (12, 1, 4, 4)
    assert source.train.images[1, 0, 0].tolist() == [16, 17, 18, 19]
    assert source.test.labels.tolist() == [0, 1, 2, 3, 4]
    assert source.classes[9] == "Ankle boot"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", "cannot read"),
        (gzip.compress(b"junk that is no IDX file", mtime=0), "not an IDX file"),
        (idx(np.zeros((2, 4, 4)))[:-12], "cannot read"),
        (gzip.compress(gzip.decompress(idx(np.zeros((2, 4, 4))))[:-1], mtime=0), "31 bytes for shape"),
        (idx(np.zeros((3, 4, 4))), "3 images but labels"),
    ],
)
def test_a_damaged_idx_file_is_named(fashion: Path, content: bytes, message: str) -> None:
    (fashion / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=f"fashion-mnist.*{message}"):
        data.load("fashion-mnist")


def test_cifar10_from_the_binary_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPO_DATA", str(tmp_path))
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        record = bytes([7]) + bytes([1]) * 1024 + bytes([2]) * 1024 + bytes([3]) * 1024
        (folder / f"{name}.bin").write_bytes(record * 2)
    source = data.load("cifar10")
    assert source.train.images.shape == (10, 3, 32, 32)
    assert source.test.images[0, :, 0, 0].tolist() == [1, 2, 3]
    assert source.test.labels.tolist() == [7, 7]
    (folder / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"test_batch\.bin: 5 bytes"):
        data.load("cifar10")


def test_cifar10_from_an_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPO_DATA", str(tmp_path))
    file = tmp_path / "cifar10_subset.npz"
    images = np.arange(4 * 32 * 32 * 3, dtype=np.uint8).reshape(4, 32, 32, 3)
    labels = np.array([0, 1, 1, 0], dtype=np.uint8)
    arrays: dict[str, Any] = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(file, **arrays, classes=np.array(["cat", "dog"]))
    source = data.load("cifar10", test_limit=3)
    assert source.train.images.shape == (4, 3, 32, 32)
    assert torch.equal(source.train.images[2, :, 5, 6], torch.from_numpy(images[2, 5, 6]))
    assert len(source.test) == 3
    assert source.classes == ("cat", "dog")
    np.savez(file, **arrays, classes=np.array(["cat"]))
    with pytest.raises(DataError, match="labels must be 0 to 0"):
        data.load("cifar10")
    np.savez(file, **arrays, classes=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="cannot read"):
        data.load("cifar10")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the extra `hub` is not installed")
@pytest.mark.filterwarnings("ignore")  # of the many libraries behind it
def test_the_hub_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from PIL import Image

    monkeypatch.setenv("TEMPO_DATA", str(tmp_path))
    repository = tmp_path / "repository"
    for part, count in (("train", 6), ("test", 2)):
        for label in range(count):
            folder = repository / part / str(label)
            folder.mkdir(parents=True)
            Image.fromarray(np.full((8, 8), 10 * label, dtype=np.uint8)).save(folder / "image.png")
    asked = []
    load_dataset = datasets.load_dataset

    def instead(name: str) -> Any:
        asked.append(name)
        return load_dataset(str(repository), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", instead)
    source = data.load("fashion-mnist")
    assert asked == ["zalando-datasets/fashion_mnist"]
    assert source.train.images.shape == (6, 1, 8, 8)
    assert source.train.images.amax((1, 2, 3)).tolist() == [10 * label for label in source.train.labels.tolist()]
    assert sorted(source.test.labels.tolist()) == [0, 1]

    def offline(name: str) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="could not be downloaded"):
        data.load("fashion-mnist")


@given(images=st.integers(1, 40), batch=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 12))
def test_order_depends_on_seed_and_epoch_and_resumes_anywhere(images: int, batch: int, seed: int, cut: int) -> None:
    if batch > images:
        with pytest.raises(DataError, match="batch_size"):
            Order(images, batch, seed)
        return

    def run(order: Order, steps: int) -> list[list[int]]:
        batches = []
        for _ in range(steps):
            batches.append(order.batch().tolist())
            order.advance()
        return batches

    straight = run(Order(images, batch, seed), 14)
    first = Order(images, batch, seed)
    begun = run(first, cut)
    second = Order(images, batch, seed)
    second.load_state_dict(first.state_dict())
    assert begun + run(second, 14 - cut) == straight
    assert all(len(chosen) == batch for chosen in straight)
    epoch = images // batch
    seen = [image for chosen in straight[:epoch] for image in chosen]
    assert len(seen) == len(set(seen))


def test_epochs_and_seeds_differ() -> None:
    one, other = Order(50, 50, 1), Order(50, 50, 2)
    first = one.batch().tolist()
    assert first != other.batch().tolist()
    one.advance()
    assert one.batch().tolist() != first


def test_augmentation_mirrors_and_shifts() -> None:
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(50, 2, 8, 8)
    assert torch.equal(augment(images, (), generator(0)), images)
    flipped = augment(images, ("flip",), generator(0))
    assert {tuple(image[0, 0].tolist()) for image in flipped} == {
        tuple(range(8)),
        tuple(reversed(range(8))),
    }
    shifted = augment(images, ("crop",), generator(0))
    assert shifted.shape == images.shape
    assert {image[0, 3, 3].item() for image in shifted} == {r * 8 + c for r in (2, 3, 4) for c in (2, 3, 4)}
    assert torch.equal(shifted, augment(images, ("crop",), generator(0)))


def test_resizing() -> None:
    form = Format(channels=1, size=16, mean=(0.5,), std=(0.5,), classes=("a",))
    assert torch.allclose(form.numbers(torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)), torch.ones(2, 1, 16, 16))

"""Weights of a worker's own checkpoint: asked for by digest, they are the integers that would have been sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tempo.engine.link import ACKNOWLEDGED, Link
from tempo.errors import SettingsError, WorkerFailedError, WorkerLacksWeightError, WorkerOutOfMemoryError
from tempo.wire.integers import digest, integers
from tempo.wire.messages import Fetch, Store
from tempo.worker.__main__ import worker
from tempo.worker.base import Base

from .conftest import InProcess

Start = Callable[..., InProcess]


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Tensor]:
    """A checkpoint of two files in ``tmp_path / "base"``."""
    torch.manual_seed(0)
    folder = tmp_path / "base"
    folder.mkdir()
    first = {"q": torch.randn(8, 9), "k": torch.randn(4, 9).bfloat16(), "qkv": torch.randn(15, 5)}
    second = {"gpt2": torch.randn(12, 8).double(), "conv": torch.randn(6, 3, 2, 2), "table": torch.arange(6).view(2, 3)}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle, which nobody reads")
    return first | second


def stored(link: Link, parts: Sequence[Tensor]) -> Tensor:
    """What a worker has, once it was asked to take ``parts`` from its base."""
    message = Store(step=0, layer=0, weight=1, digests=tuple(map(digest, parts)))
    link.request(message, {}, {})[ACKNOWLEDGED].result()
    shape = sum(len(part) for part in parts), parts[0].shape[1]
    fetch = Fetch(step=0, layer=0, weight=1)
    return link.request(fetch, {}, {"w": (shape, parts[0].dtype)})["w"].result().clone()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("bits", [8, 9])
def test_every_matrix_is_there_as_integers(start: Start, weights, tmp_path: Path, transport: str, bits: int) -> None:
    link = start(base=(tmp_path / "base",)).link(transport)
    asked = [weights["q"], weights["k"], weights["gpt2"], weights["gpt2"].t(), weights["conv"].flatten(1)]
    asked += [weights["qkv"], *weights["qkv"].chunk(3), weights["qkv"][5:]]
    for w in asked:
        w_q, _ = integers(w, bits)
        assert torch.equal(stored(link, [w_q]), w_q)
    assert link.bytes_sent == 0


def test_weights_one_below_the_other_are_one(start: Start, weights, tmp_path: Path) -> None:
    """As where layers share their input: scales belong to rows, so integers of both are the integers of each."""
    link = start(base=(tmp_path / "base",)).link()
    parts = [integers(weights[name], 9)[0] for name in ("q", "k", "q")]
    assert torch.equal(stored(link, parts), torch.cat(parts))
    together, _ = integers(torch.cat([weights["q"], weights["k"].float()]), 9)
    assert torch.equal(stored(link, parts[:2]), together)


def test_bits_are_those_that_were_asked_for(start: Start, weights, tmp_path: Path) -> None:
    link = start(base=(tmp_path / "base",), base_bits=(12,)).link()
    w_q, _ = integers(weights["q"], 12)
    assert torch.equal(stored(link, [w_q]), w_q)
    with pytest.raises(WorkerLacksWeightError):
        stored(link, [integers(weights["q"], 9)[0]])


def test_what_is_not_there_is_refused_and_the_connection_goes_on(start: Start, weights, tmp_path: Path) -> None:
    link = start(base=(tmp_path / "base",)).link()
    w_q, _ = integers(weights["q"], 9)
    for asked in [w_q + 1], [w_q, w_q + 1]:
        with pytest.raises(WorkerLacksWeightError, match="unknown-digest"):
            stored(link, asked)
    with pytest.raises(WorkerFailedError, match="bad-request: weights of different widths"):
        stored(link, [w_q, integers(weights["gpt2"], 9)[0]])
    with pytest.raises(WorkerFailedError, match="weight 1 is not stored"):
        link.request(Fetch(step=0, layer=0, weight=1), {}, {"w": ((8, 12), torch.int16)})["w"].result()
    assert torch.equal(stored(link, [w_q]), w_q)


def test_a_worker_without_a_base_says_so(start: Start) -> None:
    with pytest.raises(WorkerLacksWeightError):
        stored(start().link(), [torch.ones(2, 3, dtype=torch.int8)])


def test_tensors_and_digests_do_not_come_together(start: Start, weights, tmp_path: Path) -> None:
    link = start(base=(tmp_path / "base",)).link()
    w_q, _ = integers(weights["q"], 9)
    message = Store(step=0, layer=0, weight=1, digests=(digest(w_q),))
    with pytest.raises(WorkerFailedError, match="bad-request"):
        link.request(message, {"w": w_q}, {})[ACKNOWLEDGED].result()


def test_a_weight_that_exceeds_the_memory_limit_is_refused(start: Start, weights, tmp_path: Path) -> None:
    link = start(base=(tmp_path / "base",), memory_limit="64KiB").link()
    w_q, _ = integers(weights["q"], 9)
    with pytest.raises(WorkerOutOfMemoryError):
        stored(link, [w_q] * 1000)
    assert torch.equal(stored(link, [w_q]), w_q)


def test_a_file_that_changes_gives_nothing_else(start: Start, weights, tmp_path: Path) -> None:
    link = start(base=(tmp_path / "base",)).link()
    path = tmp_path / "base" / "model-00001-of-00002.safetensors"
    path.unlink()
    save_file({"q": weights["q"] + 1, "k": weights["k"]}, path)
    with pytest.raises(WorkerLacksWeightError, match="not what it was"):
        stored(link, [integers(weights["q"], 9)[0]])
    path.write_bytes(b"no such thing")
    with pytest.raises(WorkerLacksWeightError, match="not what it was"):
        stored(link, [integers(weights["k"], 9)[0]])
    other, _ = integers(weights["gpt2"], 9)
    assert torch.equal(stored(link, [other]), other)


def test_a_folder_without_a_checkpoint_or_with_a_broken_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"{tmp_path}.*no \\*.safetensors"):
        Base([tmp_path])
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(SettingsError, match=r"model\.safetensors cannot be read"):
        Base([tmp_path])
    with pytest.raises(SystemExit, match=r"error: --base: .*model\.safetensors cannot be read"):
        worker(base=[tmp_path])


def test_a_digest_is_of_dtype_shape_and_numbers() -> None:
    w_q = torch.arange(6, dtype=torch.int8).view(2, 3)
    others = [w_q.to(torch.int16), w_q.view(3, 2), w_q.t(), w_q.flip(0)]
    assert len({digest(w_q), *map(digest, others)}) == 5
    assert digest(w_q.t().contiguous().t()) == digest(w_q)

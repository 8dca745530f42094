from __future__ import annotations

import errno
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tempo import checkpoint
from tempo.checkpoint import CheckpointStore, flatten, load_model, unflatten
from tempo.errors import CheckpointError

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**62), 2**62), st.floats(), st.text(max_size=5), st.just("$tensor")
)
tensors = st.sampled_from(
    [
        torch.arange(6.0).reshape(2, 3),
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
        torch.tensor([1, 2], dtype=torch.bfloat16),
        torch.arange(6).reshape(2, 3).T,
    ]
)
keys = st.one_of(st.text(max_size=4), st.integers(0, 9), st.sampled_from(["$tensor", "$dict", "$tuple", "$float"]))
states = st.recursive(
    scalars | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return bool(a == b)


@given(states)
def test_any_state_survives_json(state: Any) -> None:
    values, structure = flatten(state)
    assert same(unflatten(values, json.loads(json.dumps(structure, allow_nan=False))), state)


def test_a_state_that_would_need_pickle_is_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot hold the object at /a/0"):
        flatten({"a": [object()]})


def trained(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.3}]
    optimizer: torch.optim.Optimizer
    match kind:
        case "sgd":
            optimizer = torch.optim.SGD(groups, lr=0.1)
        case "momentum":
            optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
        case _:
            optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.95))
    return model, optimizer


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
def test_an_optimizer_continues_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, optimizer = trained(kind)
    for _ in range(3):
        take_step(model, optimizer)
    values, structure = flatten(optimizer.state_dict())
    store = CheckpointStore(tmp_path)
    store.save(3, {"model": model.state_dict(), "optimizer": values}, {"optimizer": structure})

    found = store.load()
    again, other = trained(kind)
    load_model(again, found.tensors["model"], "it")
    other.load_state_dict(unflatten(found.tensors["optimizer"], found.state["optimizer"]))
    assert same(other.state_dict(), optimizer.state_dict())
    take_step(model, optimizer)
    take_step(again, other)
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_generators_continue(tmp_path: Path) -> None:
    values, structure = flatten(checkpoint.generators())
    store = CheckpointStore(tmp_path)
    store.save(1, {"generators": values}, {"generators": structure})
    expected = (random.random(), np.random.rand(3).tolist(), torch.randn(3).tolist())
    found = store.load()
    checkpoint.restore_generators(unflatten(found.tensors["generators"], found.state["generators"]))
    assert (random.random(), np.random.rand(3).tolist(), torch.randn(3).tolist()) == expected


def test_tied_and_transposed_weights_are_written_as_they_are(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    group = {"a": weight, "tied": weight, "transposed": weight.T, "view": weight[1:]}
    CheckpointStore(tmp_path).save(1, {"model": group}, {})
    found = CheckpointStore(tmp_path).load().tensors["model"]
    assert found.keys() == group.keys()
    assert all(same(found[name], group[name]) for name in group)


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, {"model": {"weight": torch.full((64,), float(step))}}, {"note": step})


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20, 30, 30):
        save(store, step)
    assert store.steps() == [20, 30]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]
    assert store.load().step == 30
    assert store.load(20).state == {"note": 20}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename", "write"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        match call:
            case "fsync":
                patch.setattr(os, "fsync", fail)
            case "rename":
                patch.setattr(Path, "rename", fail)
            case _:
                patch.setattr(checkpoint, "_write", fail)
        with pytest.raises(CheckpointError, match=f"step 20.*{os.strerror(code)}.*step 10 is intact"):
            save(store, 20)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000010"]
    assert store.load().step == 10


def test_a_real_size_limit_is_reported(tmp_path: Path) -> None:
    import resource

    store = CheckpointStore(tmp_path)
    save(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="could not write the checkpoint of step 2"):
            store.save(2, {"model": {"weight": torch.zeros(100_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.load().step == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, file: str, damage: Any) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    damage(save(store, 2) / file)
    found = store.load()
    assert found.step == 1
    assert found.state == {"note": 1}
    assert len(found.damaged) == 1
    assert "step-00000002" in found.damaged[0]
    with pytest.raises(CheckpointError, match="step-00000002"):
        store.load(2)


def test_nothing_whole_and_nothing_there_are_told_apart(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        store.load()
    flip(save(store, 1) / "state.json")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        store.load()


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = save(store, 1) / "manifest.json"
    path.write_text(path.read_text().replace("state.json", "../state.json"))
    with pytest.raises(CheckpointError, match="damaged"):
        store.load(1)


def test_a_checkpoint_of_another_model_names_the_first_difference() -> None:
    small, large = nn.Linear(3, 2), nn.Linear(4, 2)
    before = small.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"'weight' is \(2, 4\) there, \(2, 3\) here"):
        load_model(small, large.state_dict(), "step 5")
    with pytest.raises(CheckpointError, match="it has no 'bias'"):
        load_model(small, {"weight": small.weight}, "step 5")
    with pytest.raises(CheckpointError, match="it has 'bias'"):
        load_model(nn.Linear(3, 2, bias=False), small.state_dict(), "step 5")
    assert torch.equal(small.weight, before)

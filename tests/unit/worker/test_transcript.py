"""Transcripts hold what the operator saw, message by message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tempo.audit import transcript
from tempo.engine.link import ACKNOWLEDGED
from tempo.errors import SettingsError, WorkerFailedError
from tempo.wire.messages import Backward, Fetch, Forward, Linear, Lion, Store, Update

from .conftest import SESSION, InProcess

Start = Callable[..., InProcess]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_every_message_is_a_file(start: Start, tmp_path: Path, transport: str) -> None:
    link = start(transcript=tmp_path / "t").link(transport)
    torch.manual_seed(0)
    x, w, g = torch.randn(2, 4), torch.randn(3, 4), torch.randn(2, 3)
    where = {"step": 12, "layer": 5, "weight": 7}
    ids = []
    link.request(Store(**where), {"w": w}, {})[ACKNOWLEDGED].result()
    ids.append(link.last_id)
    forward = Forward(**where, operand=9, product=Linear())
    link.request(forward, {"x": x}, {"y": ((2, 3), torch.float32)})["y"].result()
    ids.append(link.last_id)
    backward = Backward(**where, operand=9, product=Linear())
    wants = {"dx": ((2, 4), torch.float32), "dw": ((3, 4), torch.float32)}
    for future in link.request(backward, {"g": g}, wants).values():
        future.result()
    ids.append(link.last_id)

    folder = tmp_path / "t" / SESSION
    operations = ["store", "forward", "backward"]
    names = [f"000012-{i:08d}-0005-{operation}.safetensors" for i, operation in zip(ids, operations)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "manifest.json"])
    stored, forwarded, backed = (load_file(folder / name) for name in names)
    assert set(stored) == {"w"}
    assert torch.equal(stored["w"], w)
    assert set(forwarded) == {"x", "y"}
    assert torch.equal(forwarded["x"], x)
    torch.testing.assert_close(forwarded["y"], x @ w.t())
    assert set(backed) == {"g", "dx", "dw"}
    assert torch.equal(backed["g"], g)
    torch.testing.assert_close(backed["dx"], g @ w)
    torch.testing.assert_close(backed["dw"], g.t() @ x)
    with safe_open(folder / names[2], "pt") as file:
        metadata = file.metadata()
    assert (metadata["weight"], metadata["operand"]) == ("7", "9")
    assert json.loads(metadata["product"]) == {"type": "linear"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["session"] == SESSION


def test_weights_that_live_on_the_worker_are_recorded_and_the_audit_follows_them(start: Start, tmp_path: Path) -> None:
    link = start(transcript=tmp_path / "t").link()
    torch.manual_seed(0)
    x, w, g, average = torch.randn(2, 4), torch.randn(3, 4), torch.randn(2, 3), torch.randn(3, 4)
    where = {"step": 1, "layer": 5, "weight": 7}

    def forward() -> None:
        message = Forward(**where, operand=9, product=Linear())
        link.request(message, {"x": x}, {"y": ((2, 3), torch.float32)})["y"].result()

    link.request(Store(**where), {"w": w, "exp_avg": average}, {})[ACKNOWLEDGED].result()
    forward()
    backward = Backward(**where, operand=9, product=Linear(), accumulate=True)
    link.request(backward, {"g": g}, {})[ACKNOWLEDGED].result()
    rule = Lion(lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0)
    link.request(Update(**where, rule=rule, scale=0.5), {}, {})[ACKNOWLEDGED].result()
    wants = {"w": ((3, 4), torch.float32), "exp_avg": ((3, 4), torch.float32)}
    fetched = {name: future.result().clone() for name, future in link.request(Fetch(**where), {}, wants).items()}
    forward()

    folder = tmp_path / "t" / SESSION
    files = {path.stem.split("-")[3]: path for path in sorted(folder.glob("*.safetensors"), reverse=True)}
    recorded = {operation: load_file(path) for operation, path in files.items()}
    assert {operation: set(tensors) for operation, tensors in recorded.items()} == {
        "store": {"w", "exp_avg"},
        "forward": {"x", "y"},
        "backward": {"g"},
        "update": {"w"},
        "fetch": {"w", "exp_avg"},
    }
    assert torch.equal(recorded["store"]["exp_avg"], average)
    assert torch.equal(recorded["update"]["w"], fetched["w"])
    assert torch.equal(recorded["fetch"]["exp_avg"], fetched["exp_avg"])
    with safe_open(files["update"], "pt") as file:
        metadata = file.metadata()
    expected = {"type": "lion", "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}
    assert json.loads(metadata["rule"]) == expected
    assert float(metadata["scale"]) == 0.5
    with safe_open(files["backward"], "pt") as file:
        assert file.metadata()["accumulate"] == "true"

    (view,) = transcript.read(folder)
    before, after = view.calls
    assert torch.equal(before.w, w)
    assert before.dx is None
    torch.testing.assert_close(before.dw, g.t() @ x)  # not in the transcript, but what the worker made of it
    assert torch.equal(before.g, g)
    assert torch.equal(after.w, fetched["w"])
    torch.testing.assert_close(after.y, x @ fetched["w"].t())
    assert after.backward is None


def test_a_transcript_that_cannot_be_written_fails_the_request(start: Start, tmp_path: Path) -> None:
    link = start(transcript=tmp_path / "t").link()
    folder = tmp_path / "t" / SESSION
    (folder / "manifest.json").unlink()
    folder.rmdir()
    future = link.request(Store(step=0, layer=0, weight=1), {"w": torch.ones(2, 2)}, {})[ACKNOWLEDGED]
    with pytest.raises(WorkerFailedError, match="transcript"):
        future.result()


def test_the_null_worker_has_nothing_to_record(start: Start, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--null"):
        start(null=True, transcript=tmp_path)

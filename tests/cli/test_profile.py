"""``tempo profile``: the trace of a step, and its sums."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tempo.cli import app
from tempo.engine.stats import Stats
from tempo.engine.trace import Answer, Exchange
from tempo.profile.accounts import GROUPS, account, place
from tempo.profile.chrome import TRUSTED, WIRE, WORKERS
from tempo.profile.recording import Interval, Recording
from tempo.worker.server import Options, Server

RECIPE = """
[model]
name = "vit-small"
width = 32
depth = 1
heads = 2
mlp = 64
patch = 2

[data]
batch_size = 16
train_limit = 64
test_limit = 16

[run]
steps = 4

[session]
scheme = "tempo"
base = "secret"
placement = "all"
"""

PRODUCTS = ("attention.q_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")


def profile(folder: Path, *arguments: str) -> dict[str, Any]:
    """The trace that the command writes."""
    recipe, trace = folder / "job.toml", folder / "out/trace.json"
    recipe.write_text(RECIPE)
    result = CliRunner().invoke(app, ["profile", str(recipe), "--step", "2", "--out", str(trace), *arguments])
    assert result.exit_code == 0, result.output
    assert "where the time goes" in result.output
    found: dict[str, Any] = json.loads(trace.read_text())
    return found


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory, workers: list[str]) -> dict[str, dict[str, Any]]:
    """By how the workers were reached: one on this machine, two over Unix sockets, one over TCP."""
    with ExitStack() as stack:
        server = Server(Options(insecure_no_tls=True))
        address = server.listen("127.0.0.1:0")
        serving = threading.Thread(target=server.accept_forever)
        serving.start()
        stack.callback(serving.join)
        stack.callback(server.close)
        ways = {
            "tcp": ("--workers", str(address), "--insecure-no-tls"),
            "two": ("--workers", ",".join(workers[:2]), "--set", "session.divide_flops=1"),
            "local": (),
        }
        return {way: profile(tmp_path_factory.mktemp(way), *arguments) for way, arguments in ways.items()}


@pytest.fixture(params=["local", "tcp", "two"])
def trace(request: pytest.FixtureRequest, traces: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return traces[request.param]


def spans(trace: dict[str, Any], process: int, category: str = "") -> list[dict[str, Any]]:
    events = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == process]
    return [event for event in events if category in ("", event["cat"])]


def test_spans_are_within_the_step_and_nested_on_every_track(trace: dict[str, Any]) -> None:
    (step,) = spans(trace, TRUSTED, "step")
    tracks = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["ts"] >= 0
            assert event["ts"] + event["dur"] <= step["dur"] + 1e-3
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"}
    assert set(tracks) == named
    for track in tracks.values():
        around: list[float] = []
        for start, end in track:
            while around and around[-1] <= start + 1e-6:
                around.pop()
            assert not around or end <= around[-1] + 1e-6
            around.append(end)


def test_the_sums_are_the_step(trace: dict[str, Any]) -> None:
    sums = trace["tempo"]
    (step,) = spans(trace, TRUSTED, "step")
    assert sums["seconds"] == pytest.approx(step["dur"] / 1e6, abs=1e-6)
    assert sum(spent for _, _, spent in sums["spent"]) == pytest.approx(sums["seconds"], abs=1e-6)
    assert sum(sums["groups"].values()) == pytest.approx(sums["seconds"], abs=1e-6)
    assert min(sums["groups"].values()) >= 0
    checks = sum(span["dur"] for span in spans(trace, TRUSTED, "verify")) / 1e6
    assert sum(spent for kind, _, spent in sums["spent"] if kind == "verify") == pytest.approx(checks, abs=1e-5)
    assert sums["groups"]["checks"] == pytest.approx(checks, abs=1e-5)


def test_every_request_and_answer_appears(trace: dict[str, Any]) -> None:
    layers = {name for layer in trace["tempo"]["layers"] for name in PRODUCTS if name in layer["name"]}
    assert layers == set(PRODUCTS)
    begun = [event for event in trace["traceEvents"] if event["ph"] == "b"]
    ended = {event["id"]: event["ts"] for event in trace["traceEvents"] if event["ph"] == "e"}
    workers = {event["args"]["worker"] for event in begun}
    for name in PRODUCTS:
        for message in "Store", "Forward", "Backward":
            found = [event for event in begun if message in event["name"] and name in event["name"]]
            assert {event["args"]["worker"] for event in found} == workers, (name, message)
    received = spans(trace, WIRE, "receive")
    for event in begun:
        assert event["ts"] <= ended[event["id"]]
        assert event["args"]["answers"] == sum(span["args"]["request"] == event["id"] for span in received)
        assert event["args"]["answers"] >= 1
    assert len(spans(trace, WORKERS, "compute")) == len(received)
    sent, back = sum(event["args"]["bytes sent"] for event in begun), sum(span["args"]["bytes"] for span in received)
    assert sent == sum(layer["sent"] for layer in trace["tempo"]["layers"]) > 0
    assert back == sum(layer["received"] for layer in trace["tempo"]["layers"]) > 0
    assert set(trace["tempo"]["workers"]) == workers


def test_trusted_layers_are_told_apart_forward_and_backward(traces: dict[str, dict[str, Any]]) -> None:
    trace = traces["local"]
    for kind in "module", "gradient":
        types = {what for found, what, spent in trace["tempo"]["spent"] if found == kind and spent > 0}
        assert {"LayerNorm", "GELUActivation"} <= types, kind
    assert {"data", "loss", "backward", "optimizer"} <= {kind for kind, _, _ in trace["tempo"]["spent"]}


def test_a_plain_step_has_neither_masks_nor_workers(tmp_path: Path) -> None:
    sums = profile(tmp_path, "--plain", "--figure", str(tmp_path / "step.svg"))["tempo"]
    assert not sums["workers"]
    assert not sums["layers"]
    assert sums["groups"]["masks"] == sums["groups"]["wire"] == 0
    assert sum(sums["groups"].values()) == pytest.approx(sums["seconds"], abs=1e-6)
    assert sums["groups"]["trusted layers"] > 0
    assert (tmp_path / "step.svg").read_text().count("<path") > 3
    assert "| the step |" in (tmp_path / "out/trace.md").read_text()


def test_what_a_worker_claims_stays_within_its_requests_and_one_at_a_time() -> None:
    answers = [Answer("y", 50, 60, 10**12, 4), Answer("", 90, 90, -5, 0), Answer("dx", 120, 130, 25, 4)]
    exchanges = [Exchange("w", "Forward", "a", sent=20 * i, answers=[it]) for i, it in enumerate(answers)]
    assert [(c.start, c.end) for c in place(exchanges)["w"]] == [(0, 50), (90, 90), (95, 120)]


def test_waiting_is_the_workers_while_one_computes_and_the_wires_else() -> None:
    thread = [
        Interval(0, 100, "module", "Linear", "a"),
        Interval(10, 20, "mask", "x", "a"),
        Interval(12, 15, "op", "aten::bmm"),
        Interval(20, 25, "wire", "Forward", "a"),
        Interval(30, 90, "wait", "y", "a"),
    ]
    exchange = Exchange("w", "Forward", "a", sent=21, size=8, answers=[Answer("y", 70, 85, 30, 4)])
    sums = account(Recording(120, thread, {}, [exchange]))
    assert sums.spent == {
        ("module", "Linear"): 10 + 5 + 10,
        ("mask", "x"): 10,
        ("wire", "sending"): 5,
        ("wire", "waiting"): 10 + 20,
        ("worker", ""): 30,
        ("rest", ""): 20,
    }
    assert (sums.waiting, sums.bound) == (60, 60)
    (layer,) = sums.layers
    assert (layer.mask, layer.wire, layer.worker, layer.computed, layer.sent, layer.received) == (10, 35, 30, 30, 8, 4)


def test_all_that_a_session_times_has_a_place() -> None:
    assert set(Stats().seconds) <= set(GROUPS)


def test_nothing_is_traced_otherwise(connect: Any) -> None:
    session = connect()
    model = session.protect(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)))
    model(torch.randn(8, 64)).sum().backward()
    assert session.stats().trace is None
    assert session._engine.stats.trace is None

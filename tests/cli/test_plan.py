"""``tempo plan`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tempo.cli import app


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """What ``tempo bench --json`` writes of a block under `split`: 0.5 ns per byte, 20 GFLOP/s of attention."""
    figures = {
        "model": "llama-1b",
        "description": "the block that was measured",
        "scheme": "split",
        "plain_step": 30.0,
        "protected_step": None,
        "trusted_step": 2.0,
        "trusted_speedup": 15.0,
        "flop_bound": 30.0,
        "offloaded_flops_share": 0.97,
        "mask_seconds": 1.0,
        "wire_seconds": 0.1,
        "other_seconds": 0.9,
        "attention_seconds": 0.5,
        "attention_flops": 10**10,
        "bytes_up": 10**9,
        "bytes_down": 2 * 10**9,
        "encryptions": {},
        "steps": 3,
        "loss_difference": None,
        "machine": {"cpu": "the CPU that measured", "date": "2026-11-29"},
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([figures]))
    return path


def test_plan_shows_both_models_on_all_hardware_and_what_it_rests_on(bench, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["plan", "--bench", str(bench)])
    assert result.exit_code == 0, result.output
    for shown in ("llama-2-7b", "llama-2-70b", "RTX 4090", "A100", "H100", "bound by"):
        assert shown in result.output
    # Every assumption.
    for shown in ("the block that was measured", "the CPU that measured", "0.50 ns", "20.0 GFLOP/s", "1,024 tokens"):
        assert shown in result.output
    for shown in (
        "9 bits",
        "(here int8), at 25%",
        "90% of their memory",
        "$0.05/h",
        "$0.00/GB",
        "no recomputation",
    ):
        assert shown in result.output


def test_plan_follows_its_options(bench):
    options = ["--gpu", "a100", "--link", "25", "--cores", "4", "--colluders", "2", "--bits", "8", "--sequence", "512",
               "--batch", "4096", "--latency", "2"]  # fmt: skip
    prices = ["--price", "a100=2", "--price", "core=0.1", "--price", "gigabyte=0.01"]
    command = ["plan", "llama-2-7b", "--bench", str(bench), *options, *prices, "--json", "-"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (one,) = found["models"]["llama-2-7b"]
    assert (one["worker"], one["operators"]) == ("A100 80GB", 3)
    assert one["link"] == {"up": 25.0, "down": 25.0, "latency": 0.002}
    first = 4 * 3 * 4096, 4 * 4096  # of the first product: gradients of outputs, of inputs
    assert one["bytes_down"] + 3 * first[1] == 3 * (one["bytes_up"] + first[0])
    assert found["assumptions"] == {
        "sequence": 512,
        "batch": 4096,
        "cores": 4,
        "colluders": 2,
        "weight_bits": 8,
        "utilisation": 0.25,
        "memory_share": 0.9,
        "core_hour": 0.1,
        "gigabyte": 0.01,
    }
    assert found["hours"] == {"A100 80GB": 2.0}
    assert found["rates"]["per_byte"] == pytest.approx(0.5e-9)
    hour, megabytes = 3 * 2 + 4 * 0.1, (one["bytes_up"] + one["bytes_down"]) / 1e6
    seconds = 1 / one["tokens_per_second"]
    assert one["cost"] == pytest.approx(1e6 * (seconds * hour / 3600 + megabytes / 1e3 * 0.01))


def test_plan_measures_workers_that_are_there(bench, workers, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 100, **sizes}))
    options = ["--workers", f"{workers[0]}@one,{workers[1]}@two", "--price", "worker=0.2", "--price", "core=0"]
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--bench", str(bench), *options, "--json", "-"])
    assert result.exit_code == 0, result.output
    (one,) = json.loads(result.stdout)["models"][str(tmp_path)]
    assert (one["worker"], one["operators"], one["arithmetic"]) == ("cpu", 2, "as measured")
    assert min(one["link"]["up"], one["link"]["down"], one["link"]["latency"], one["worker_seconds"]) > 0
    assert one["cost"] == pytest.approx(1e6 / one["tokens_per_second"] / 3600 * 2 * 0.2)


def test_plan_refuses_two_workers_of_one_operator(bench, workers):
    result = CliRunner().invoke(app, ["plan", "--bench", str(bench), "--workers", f"{workers[0]},{workers[1]}"])
    assert result.exit_code == 1
    assert "operator" in result.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["llama-3"], "config.json"),
        (["--gpu", "h10"], "h100"),
        (["--link", "0"], "0 Gbit/s"),
        (["--latency", "-1"], "-1 ms"),
        (["--cores", "0"], "cores"),
        (["--bits", "17"], "weight_bits"),
        (["--utilisation", "1.5"], "utilisation"),
        (["--price", "h200=3"], "h100"),
        (["--price", "h100=much"], "h100=0.50"),
        (["--price", "core=-1"], "0 or more"),
        (["--price", "core=2000000"], "core_hour"),
    ],
)
def test_plan_says_what_is_wrong(bench, options, says):
    result = CliRunner().invoke(app, ["plan", "--bench", str(bench), *options])
    assert result.exit_code == 1
    assert says in result.output
    assert "Traceback" not in result.output

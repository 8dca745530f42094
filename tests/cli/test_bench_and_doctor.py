"""``tempo bench`` and ``tempo doctor`` as a user runs them."""

from __future__ import annotations

import json
import re
import sys
import threading
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tempo.bench import measure as bench
from tempo.bench.memory import LayerBytes
from tempo.bench.workloads import Workload, _vit
from tempo.cli import app
from tempo.errors import SettingsError
from tempo.settings import Settings
from tempo.worker.server import Options, Server


def tiny(batch: int = 8) -> Workload:
    return _vit("a tiny ViT", 32, 1, 2, 64, 16, batch)


def test_bench_reports_what_it_measured(monkeypatch):
    monkeypatch.setitem(bench.WORKLOADS, "tiny", tiny)
    result = bench.measure("tiny", Settings(scheme="tempo", placement="all"), 1, lambda line: None)
    assert result.trusted_speedup == pytest.approx(result.plain_step / result.trusted_step)
    parts = (result.mask_seconds, result.verify_seconds, result.wire_seconds, result.other_seconds)
    assert sum(parts) == pytest.approx(result.trusted_step)
    assert min(parts) > 0
    assert result.loss_difference < 1e-5
    assert result.offloaded_flops_share > 0.5
    # One block: query, key and value together, output, two of the MLP; and the classifier.
    assert result.encryptions == {"x": 5, "w": 5, "g": 5}
    assert result.bytes_up == result.bytes_down > 0
    # Nothing travels twice, and each weight with its gradient once.
    assert result.weight_bytes_up == result.weight_bytes_down == 4 * (4 * 32 * 32 + 2 * 32 * 64 + 32 * 10)
    assert result.least_bytes_up == result.bytes_up - result.weight_bytes_up
    assert result.least_bytes_down == result.bytes_down - result.weight_bytes_down
    # What travels is read and written on this side.
    assert result.memory_bytes > result.mask_memory_bytes == 2 * (result.bytes_up + result.bytes_down)
    assert result.memory_bound == pytest.approx(result.plain_step * result.copy_bytes_per_s / result.memory_bytes)


def test_bench_counts_what_trusted_layers_take_and_give():
    model = nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.0), nn.Sequential(nn.ReLU()), nn.Identity())
    with LayerBytes(model) as found:
        y = model(torch.zeros(3, 4))
    assert found.total == (1 + 2 + 2 + 2) * y.nbytes  # no gradient of the input is wanted
    model(y)
    assert found.total == 7 * y.nbytes


def test_bench_counts_sums_and_attention_within_the_model():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + nn.functional.scaled_dot_product_attention(x, x, x)

    model, x = Attention(), torch.zeros(2, 1, 3, 4, requires_grad=True)
    with LayerBytes(model) as found:
        y = model(x)
        y + y  # not the model's
    assert found.total == 2 * (4 + 3) * x.nbytes


def test_bench_averages_over_the_steps_that_weights_on_workers_keep_their_masks(monkeypatch):
    monkeypatch.setitem(bench.WORKLOADS, "tiny", tiny)

    def measured(update: str) -> bench.Measurement:
        settings = Settings(scheme="tempo-signed", placement="all", update=update, rekey_rows=4 * 8 * 17)
        return bench.measure("tiny", settings, 1, lambda line: None)

    here, away = measured("trusted"), measured("worker")
    assert (here.period, here.steps) == (1, 1)
    assert (away.period, away.steps) == (4, 4)
    # Once in four steps the weights of the block go out anew, each with its momentum; those of the classifier, with
    # its 8 rows a step, did not in these.
    assert here.encryptions == {"x": 5, "w": 5, "g": 5}
    assert away.encryptions == {"x": 5, "w": 2 * 4 / 4, "g": 5}
    block, classifier = 4 * 4 * 32 * 32 + 2 * 4 * 32 * 64, 4 * 32 * 10
    assert here.bytes_up - away.bytes_up == block // 2 + classifier
    assert here.bytes_down - away.bytes_down == block // 2 + classifier


def test_bench_of_adapters_sends_a_frozen_base_and_keeps_adapters(monkeypatch):
    compared, agree = [], bench._LenientPolicy.agree

    def agree_and_tell(policy, found, expected):
        compared.append(torch.equal(found, expected))
        return agree(policy, found, expected)

    monkeypatch.setattr(bench._LenientPolicy, "agree", agree_and_tell)
    settings = Settings(scheme="split", base="public", placement="all")
    result = bench.measure("minilm", settings, 1, lambda line: None, batch=1)
    assert result.loss_difference < 1e-4
    assert result.offloaded_flops_share > 0.7
    assert result.tokens == 256
    # Query, key and value together, output, two of the MLP: inputs and gradients go out, weights went before.
    assert result.encryptions == {"x": 4, "w": 0, "g": 4}
    features = (384 + 3 * 384) + (384 + 384) + (384 + 1536) + (1536 + 384)
    seeds = 8 * 32
    assert result.bytes_up == 4 * 256 * features + seeds
    assert result.bytes_down == 2 * 4 * 256 * features
    # Each of the two operators answers with a share of its own.
    assert (result.least_bytes_up, result.least_bytes_down) == (4 * 256 * features, 4 * 256 * features)
    assert result.weight_bytes_up == result.weight_bytes_down == 0
    assert 0 < result.attention_seconds < result.trusted_step
    assert result.attention_flops == 14 * 256**2 * 384
    # What null workers answer is summed and compared like any answer, and wrong: of three steps, 4 outputs at least and
    # as many gradients.
    assert len(compared) >= 3 * 8
    assert not any(compared)


def test_bench_shows_adapters_beside_other_schemes_and_gives_plans_their_rates(tmp_path):
    options = ["--model", "llama-small", "--batch", "1", "--steps", "1", "--no-real"]
    result = CliRunner().invoke(app, ["bench", *options, "--json", str(tmp_path / "bench.json")])
    assert result.exit_code == 0, result.output
    # From two workers under `split`, and from one under `mix-tuned`.
    assert ["69,632", "34,816"] in [re.findall(r"[\d,]+", line) for line in result.output.splitlines()]
    assert "real workers" not in result.output
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 1, "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 1, **sizes}))
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--bench", str(tmp_path / "bench.json"), "--json", "-"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)["models"][str(tmp_path)][0]
    # A whole model has a head, and nothing that is trained before its first product: the block is given its gradient.
    head, gradients = 4 * (512 + 1), (4 * 3 * 512, 4 * 512)
    assert plan["bytes_up"] - head + gradients[0] == 34_816
    assert plan["bytes_down"] - 2 * head + 2 * gradients[1] == 69_632


def test_bench_says_which_package_a_model_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingsError, match="pip install peft"):
        bench.measure("minilm", Settings(), 1, lambda line: None)


def test_bench_names_the_nearest_model():
    with pytest.raises(SettingsError, match="vit-small"):
        bench.measure("vit-smal", Settings(), 1, lambda line: None)


def test_bench_writes_json_to_standard_output(monkeypatch):
    monkeypatch.setitem(bench.WORKLOADS, "vit-small", tiny)
    result = CliRunner().invoke(app, ["bench", "--model", "vit-small", "--steps", "1", "--json", "-"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert [found["scheme"] for found in figures] == ["tempo", "mix", "mix-tuned"]
    for found in figures:
        assert found["model"] == "vit-small"
        assert found["machine"]["torch"]
        assert found["encryptions"]["x"] > 0
    # The classifier has fewer classes than a block of `mix` has features.
    assert figures[0]["encryptions"]["g"] == figures[1]["encryptions"]["g"] + 1


def test_doctor_shows_a_worker_and_says_what_is_wrong_with_another(workers, tmp_path):
    missing = f"unix:{tmp_path}/nobody.sock"
    result = CliRunner().invoke(app, ["doctor", workers[0], missing])
    assert result.exit_code == 1
    assert "GFLOP/s" in result.output
    assert " ×" in result.output
    assert f"✗ {missing}: " in result.output


def test_doctor_says_which_workers_nothing_binds_to_their_operators(workers):
    with ExitStack() as stack:
        server = Server(Options(insecure_no_tls=True, null=True))
        address = f"{server.listen('127.0.0.1:0')}@two"
        serving = threading.Thread(target=server.accept_forever)
        serving.start()
        stack.callback(serving.join)
        stack.callback(server.close)
        result = CliRunner().invoke(app, ["doctor", f"{workers[0]}@one", address, "--insecure-no-tls"])
    assert result.exit_code == 0, result.output
    assert f"scheme split would refuse {address}: without TLS" in result.output
    assert "refuse unix" not in result.output


def test_doctor_is_content_with_good_workers(workers):
    result = CliRunner().invoke(app, ["doctor", workers[0]])
    assert result.exit_code == 0, result.output


def test_doctor_says_what_keeps_memory_from_large_pages(workers, tmp_path, monkeypatch):
    monkeypatch.setattr("tempo.cli.doctor._PAGES", tmp_path)
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    (tmp_path / "shmem_enabled").write_text("always within_size advise [never] deny force\n")
    result = CliRunner().invoke(app, ["doctor", workers[0]])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert any("shared memory" in line and "echo advise >" in line for line in lines), result.output
    assert not any("echo madvise" in line for line in lines)

"""What a plan is made of: shapes from files, rates from benchmarks, and what is wrong with them."""

from __future__ import annotations

import json

import msgspec
import pytest

from tempo.bench.measure import Measurement
from tempo.errors import SettingsError
from tempo.plan import rates
from tempo.plan.models import Shape, find

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
}


def measurement(**fields) -> Measurement:
    fields = {
        "model": "llama-1b",
        "description": "a block",
        "scheme": "split",
        "plain_step": 30.0,
        "protected_step": None,
        "trusted_step": 2.5,
        "trusted_speedup": 12.0,
        "flop_bound": 30.0,
        "offloaded_flops_share": 0.97,
        "mask_seconds": 1.0,
        "wire_seconds": 0.1,
        "other_seconds": 1.4,
        "attention_seconds": 0.5,
        "attention_flops": 10**10,
        "bytes_up": 10**9,
        "bytes_down": 2 * 10**9,
        "tokens": 8192,
        "encryptions": {},
        "steps": 3,
        "loss_difference": None,
        "machine": {"cpu": "a"},
        **fields,
    }
    return Measurement(**fields)


def test_a_config_file_or_its_folder_gives_a_shape(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    shape = find(str(tmp_path))
    assert shape == find(str(tmp_path / "config.json"))
    assert shape.products[:4] == [(2048, 2048 + 1024), (2048, 2048), (2048, 16384), (8192, 2048)]
    assert shape.products[-1] == (2048, 128256)
    assert len(shape.products) == 4 * 16 + 1


def test_heads_may_be_wider_than_the_model_over_their_number(tmp_path):
    shape = Shape(**{k: v for k, v in LLAMA.items() if k in Shape.__struct_fields__} | {"head_dim": 128})
    assert shape.products[:2] == [(2048, 4096 + 2048), (4096, 2048)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"intermediate_size": 1 << 40}, "intermediate_size"),
        ({"num_hidden_layers": "16"}, "num_hidden_layers"),
        ({"model_type": "mixtral"}, "mixtral.*llama"),
        ({"head_dim": None, "hidden_size": 2000}, "head_dim"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
    ],
)
def test_a_wrong_config_is_refused_by_file_and_field(tmp_path, change, says):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | change))
    with pytest.raises(SettingsError, match=f"config.json.*{says}"):
        find(str(path))


def test_a_config_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SettingsError, match=r"config\.json"):
        find(str(tmp_path))


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(SettingsError, match=r"llama-2-7b.*config\.json"):
        find("llama-2-7")


def test_rates_are_of_attention_and_of_all_else(tmp_path):
    path = tmp_path / "bench.json"
    path.write_bytes(msgspec.json.encode([measurement(scheme="mix-tuned"), measurement()]))
    found = rates.read(path)
    assert found.per_byte == pytest.approx(2.0 / 3e9)
    assert found.per_attention_flop == pytest.approx(5e-11)
    assert (found.measured, found.machine) == ("a block", {"cpu": "a"})


@pytest.mark.parametrize(
    "change", [{"scheme": "mix"}, {"attention_flops": 0}, {"attention_seconds": 2.5}, {"bytes_up": 0, "bytes_down": 0}]
)
def test_a_benchmark_that_gives_no_rates_is_refused_with_the_command_for_one_that_does(tmp_path, change):
    path = tmp_path / "bench.json"
    path.write_bytes(msgspec.json.encode([measurement(**change)]))
    with pytest.raises(SettingsError, match="tempo bench --model llama-1b --scheme split"):
        rates.read(path)


@pytest.mark.parametrize("text", ["", "{}", '[{"model": "x"}]', "[]"])
def test_what_is_no_benchmark_is_refused(tmp_path, text):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"bench\.json"):
        rates.read(path)
    with pytest.raises(SettingsError, match="no file"):
        rates.read(tmp_path / "none.json")


def test_rates_are_measured_here_under_split_with_null_workers(monkeypatch):
    def instead(model, settings, steps, report, *, real) -> Measurement:
        assert (settings.scheme, settings.base, settings.placement, real) == ("split", "public", "all", False)
        return measurement(model=model)

    monkeypatch.setattr(rates, "measure", instead)
    assert rates.here(lambda line: None) == rates.of(measurement())

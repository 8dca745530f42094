"""First and last layers: kept by default, with the reason and the price, and sent where that was asked for."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import transformers as hf
from torch import nn

from tempo.errors import ProtectionWarning, SettingsError
from tempo.layers.exposed import exposed_layers

LAST = "last layer: the gradient of its output shows labels"
FIRST = "first layer: it sees the inputs as they come"


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(n, m) for n, m in itertools.pairwise(widths)))


def reasons(session) -> dict[str, str]:
    return {line.name: line.reason for line in session.summary().lines}


def protected(session, model, *inputs, **arguments):
    session._engine.planner.placement = "all"  # anything pays off
    session.protect(model, **arguments)
    model(*inputs)
    return reasons(session)


@pytest.mark.filterwarnings("ignore::tempo.errors.ProtectionWarning")
def test_first_and_last_stay_and_what_is_between_goes(connect):
    found = protected(connect(placement="auto"), mlp(8, 8, 8, 4), torch.ones(2, 8))
    assert found == {"0": FIRST, "1": "offloaded", "2": LAST}


@pytest.mark.parametrize("place", ["settings", "call"])
def test_offload_sends_an_exposed_layer_and_trusted_wins_over_it(connect, place):
    patterns = {"offload": ["0", "2"], "trusted": ["2"]}
    in_settings = {key: tuple(value) for key, value in patterns.items()} if place == "settings" else {}
    session = connect(placement="auto", **in_settings)
    found = protected(session, mlp(8, 8, 8, 4), torch.ones(2, 8), **(patterns if place == "call" else {}))
    assert found == {"0": "offloaded", "1": "offloaded", "2": "kept by trusted='2'"}


def test_an_offload_pattern_that_covers_nothing_is_refused(connect):
    with pytest.raises(SettingsError, match="offload='clasifier' covers none"):
        connect(placement="auto").protect(mlp(8, 8), offload=["clasifier"])


def test_all_sends_them_with_a_word_about_each(connect):
    session = connect()
    with pytest.warns(ProtectionWarning) as caught:
        found = protected(session, mlp(8, 8, 8, 4), torch.ones(2, 8))
    assert set(found.values()) == {"offloaded"}
    texts = [str(warning.message) for warning in caught]
    assert any("layer '0' is the first one, so workers get masked raw inputs" in text for text in texts)
    assert any("layer '2' is the last one" in text and "(trusted='2' keeps it here)" in text for text in texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.protect(mlp(8, 8, 8, 4))  # said once


def test_nothing_is_said_of_what_the_scheme_keeps_anyway(connect):
    session = connect(scheme="mix")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.protect(nn.Sequential(nn.Conv2d(3, 32, 3), nn.Flatten(), nn.Linear(32, 64), nn.Linear(64, 10)))


@pytest.mark.parametrize(("width", "says"), [(100, True), (10, False)])
def test_a_large_last_layer_has_its_price_named(connect, width, says):
    model = mlp(100, 100, 100, width)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        connect(scheme="insecure-plain", placement="auto").protect(model)
    texts = [str(w.message) for w in caught if "the last layer '2' stays trusted" in str(w.message)]
    assert len(texts) == says
    assert all("33% of the parameters" in text and "offload=('2',)" in text for text in texts)


@pytest.mark.parametrize("model", [mlp(8, 8), mlp(8, 8, 8)], ids=["one layer", "two layers"])
def test_a_model_that_is_all_first_and_last_does_not_stay_home_silently(connect, model):
    with pytest.warns(ProtectionWarning, match=r"nothing of this model goes out: .*offload="):
        connect(scheme="insecure-plain", placement="auto").protect(model)


def test_a_model_too_narrow_for_the_scheme_does_not_stay_home_silently(connect):
    with pytest.warns(ProtectionWarning, match=r"goes out: layers of fewer features than scheme 'mix'"):
        connect(scheme="mix").protect(mlp(8, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        connect(scheme="mix").protect(mlp(8, 8, 8), trusted=["*"])  # as asked


def names(model: nn.Module) -> dict[str, str]:
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    return {name: found.reason.split(":")[0] for name, found in exposed_layers(model, layers).items()}


def test_after_an_embedding_or_a_convolution_no_linear_is_first():
    assert names(nn.Sequential(nn.Embedding(9, 8), *mlp(8, 8, 8))) == {"2": "last layer"}
    assert names(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), *mlp(8, 8, 8))) == {
        "0": "first convolution",
        "3": "last layer",
    }
    assert names(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8)))["0"] == "first layer"


def test_a_language_model_tells_its_output_layer():
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, num_key_value_heads=1, **size))
    model = nn.ModuleDict({"wrapped": model, "after": nn.Linear(8, 8)})
    assert names(model) == {"wrapped.lm_head": "last layer"}


def test_few_maps_of_many_pixels_are_warned_of_once_per_layer(connect):
    session = connect(scheme="insecure-plain")
    model = session.protect(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.ones(2, 8, 6, 6))
        model(torch.ones(3, 8, 6, 6))
    (text,) = [str(w.message) for w in caught if "pixels of a map" in str(w.message)]
    assert "layer '0': batch × channels is 16, below the 36 pixels" in text  # a 1×1 convolution mixes pixels too
    other = session.protect(nn.Conv2d(8, 8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(torch.ones(5, 8, 6, 6))

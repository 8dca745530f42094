"""The front door: opening, counting, closing."""

from __future__ import annotations

import gc
import json
import types
import warnings
import weakref

import pytest
import torch
from torch import nn

import tempo
from tempo.conditions import conditions
from tempo.errors import ProtectionWarning, SessionClosedError, SettingsError
from tempo.initial import origin
from tempo.settings import Settings


def test_settings_come_whole_or_in_single_fields_not_both(workers):
    with pytest.raises(SettingsError, match="not both \\(scheme\\)"):
        tempo.connect(workers[0], settings=Settings(), scheme="tempo")
    with tempo.connect(workers[0], settings=Settings(scheme="insecure-plain", placement="all")) as session:
        assert session.settings.scheme == "insecure-plain"


def test_counts_are_a_copy_and_can_be_subtracted(connect):
    session = connect()
    model = session.protect(nn.Linear(4, 3))
    start = session.stats()
    model(torch.ones(5, 4)).sum().backward()
    used = session.stats() - start
    assert start.encryptions == {"x": 0, "w": 0, "g": 0}
    assert used.encryptions == {"x": 1, "w": 1, "g": 1}
    # The input needs no gradient: forward, and that of the weight.
    assert used.decryptions == {"y": 1, "dx": 0, "dw": 1, "w": 0}
    assert used.flops_offloaded == 2 * (2 * 5 * 4 * 3)
    # w, x, g up; y, dw down; four bytes each.
    assert used.bytes_sent == 4 * (3 * 4 + 5 * 4 + 5 * 3)
    assert used.bytes_received == 4 * (5 * 3 + 3 * 4)
    assert all(seconds >= 0 for seconds in used.seconds.values())
    assert session.stats() - session.stats() == start - start


def test_several_models_share_a_session_and_models_move_between_sessions(connect):
    torch.manual_seed(0)
    first, second = connect(), connect()
    a, b, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.ones(2, 4)
    expected = a(x), b(x)
    for model in (a, b):
        first.protect(model)
    for model, y in zip((a, b), expected, strict=True):
        torch.testing.assert_close(model(x), y)
    assert first.stats().encryptions["x"] == 2
    second.protect(first.unprotect(a))
    torch.testing.assert_close(a(x), expected[0])
    assert first.stats().encryptions["x"] == 2
    assert second.stats().encryptions["x"] == 1


def test_closing_twice_is_fine_and_leaving_the_block_closes(workers):
    with tempo.connect(workers[0], placement="all", scheme="tempo") as session:
        model = session.protect(nn.Linear(4, 3))
    session.close()
    with pytest.raises(SessionClosedError):
        model(torch.ones(2, 4))
    assert session.unprotect(model)(torch.ones(2, 4)).shape == (2, 3)


def test_a_backward_pass_needs_its_session_too(connect):
    session = connect()
    y = session.protect(nn.Linear(4, 3))(torch.ones(2, 4))
    session.close()
    with pytest.raises(SessionClosedError, match="this session is closed"):
        y.sum().backward()


def test_workers_forget_what_is_garbage_here(connect, monkeypatch):
    session = connect()
    model = session.protect(nn.Linear(4, 3))
    forgotten = []
    monkeypatch.setattr(session._engine.links[0], "forget", lambda **numbers: forgotten.append(numbers))
    y = model(torch.ones(2, 4))
    del y
    gc.collect()
    assert [{what: len(numbers) for what, numbers in one.items()} for one in forgotten] == [{"operands": 1}]
    with torch.no_grad():
        model.weight += 1
    model(torch.ones(2, 4))
    assert [len(one["weights"]) for one in forgotten if "weights" in one] == [1]


def test_a_session_without_its_model_keeps_no_graph_alive(connect):
    session = connect()
    model = session.protect(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    x = torch.ones(2, 4, requires_grad=True)
    hidden = model[0](x)
    alive = weakref.ref(hidden)
    model[2](hidden).sum().backward()
    del hidden
    gc.collect()
    assert alive() is None


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))


def scheme_of(model: nn.Module) -> str:
    return model[0]._tempo.scheme.name


@pytest.mark.parametrize(
    ("scheme", "base", "expected"),
    [
        ("mix", "secret", "mix"),
        ("mix", "public", "mix-tuned"),
        ("mix", "auto", "mix-tuned"),
        ("mix-tuned", "secret", "mix-tuned"),
        ("tempo", "public", "tempo"),
    ],
)
@pytest.mark.parametrize("place", ["settings", "call"])
def test_the_base_chooses_the_preset_of_mix(connect, scheme, base, expected, place):
    session = connect(scheme=scheme, base=base if place == "settings" else "auto")
    model = session.protect(wide(), base=base if place == "call" else None)
    assert scheme_of(model) == expected
    x = torch.linspace(-1, 1, 3 * 32).sin().view(3, 32)
    torch.testing.assert_close(model(x), wide()(x), rtol=1e-4, atol=1e-5)
    assert session.stats().flops_offloaded > 0


def test_one_session_may_hold_models_of_both_bases(connect, caplog):
    session = connect(scheme="mix", base="auto")
    with caplog.at_level("INFO", logger="tempo"):
        models = [session.protect(m) for m in (tempo.secret_initialisation(wide()), wide(), wide())]
    assert [scheme_of(model) for model in models] == ["mix", "mix-tuned", "mix-tuned"]
    assert models[1][0]._tempo.scheme is models[2][0]._tempo.scheme
    said = [(record.levelname, record.getMessage().split(":")[0]) for record in caplog.records]
    assert said == [("INFO", "scheme 'mix', base secret"), ("WARNING", "scheme 'mix-tuned', base public")]


def test_the_record_of_the_truth_names_the_schemes_that_were_used(connect, tmp_path):
    session = connect(scheme="mix", insecure_record_truth=str(tmp_path))
    (manifest,) = tmp_path.glob("*/manifest.json")
    for base, expected in (("public", "mix-tuned"), ("public", "mix-tuned"), ("secret", "mix-tuned, mix")):
        session.protect(wide(), base=base)
        assert json.loads(manifest.read_text())["scheme"] == expected


def test_a_public_base_under_a_scheme_that_it_breaks_is_warned_of_once(connect):
    for scheme, match in (("tempo", "signatures against the public checkpoint"), ("mix", "gives a fine-tuned change")):
        session = connect(scheme=scheme)
        model = wide()
        model.config = types.SimpleNamespace(_name_or_path="somebody/model", hidden_act="quick_gelu")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            session.protect(model)
            session.protect(session.unprotect(model))
        assert [w.category for w in caught if match in str(w.message)] == [ProtectionWarning]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU()), {"always", "relu"}),
        (nn.Sequential(nn.Linear(4, 4), nn.SiLU()), {"always", "relu"}),
        (nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), {"always"}),
    ],
)
def test_activations_that_keep_signs_are_seen(model, expected):
    assert conditions(model, origin(model)) == expected
    model.config = types.SimpleNamespace(_name_or_path="", activation_function="gelu_new")
    assert conditions(model, origin(model, "public")) == {"always", "relu", "public-base"}


def test_convolutions_that_go_out_as_they_are_are_warned_of_under_mix(connect):
    x = torch.randn(2, 40, 5, 5)
    for kernel, options, warned in ((3, {}, True), (3, {"unfold": True}, False), (1, {}, False)):
        model = connect(scheme="mix", **options).protect(nn.Conv2d(40, 40, kernel))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(x)
            model(x)
        assert sum("unfold=True" in str(w.message) for w in caught) == warned


def test_a_session_that_is_over_leaves_no_engine_behind(workers):
    model = nn.Linear(4, 3)
    with tempo.connect(workers[0], scheme="insecure-plain", placement="all") as session:
        session.protect(model)
        model(torch.ones(5, 4)).sum().backward()
        session.unprotect(model)
    engine = weakref.ref(session._engine)
    del session
    gc.collect()
    assert engine() is None

"""Ways in which a session once failed open, or kept what it should have let go."""

from __future__ import annotations

import copy
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

import tempo
from tempo.checkpoint import Checkpoint
from tempo.engine.fingerprint import Fingerprint
from tempo.errors import ProtectionWarning, SettingsError, WorkerOutOfMemoryError
from tempo.recipes.inference import recipe_of
from tempo.settings import Settings


def nested() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Sequential(nn.Dropout(0.0), nn.Linear(8, 4)))


def test_a_trusted_container_keeps_everything_inside_it(connect):
    session = connect()
    model = session.protect(nested(), trusted=["2"])
    model(torch.randn(3, 8))
    places = {line.name: (line.offloaded > 0, line.trusted > 0) for line in session.summary().lines}
    assert places == {"0": (True, False), "2.1": (False, True)}


@pytest.mark.parametrize("place", ["settings", "call"])
def test_a_pattern_that_keeps_nothing_is_refused(connect, place):
    session = connect(trusted=("clasifier",) if place == "settings" else ())
    model = nested()
    with pytest.raises(SettingsError, match="clasifier"):
        session.protect(model, trusted=["clasifier"] if place == "call" else [])
    assert type(model[0]) is nn.Linear


def test_a_pattern_cannot_split_an_attention_layer(connect):
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    with pytest.raises(SettingsError, match=r"'1\.out_proj', which goes where its attention layer goes"):
        connect().protect(model, trusted=["*out_proj", "0"])


def test_a_worker_that_had_no_room_is_sent_the_weight_again():
    with tempo.connect(scheme="tempo", placement="all") as session:
        model = session.protect(nn.Linear(4096, 2048))
        link = session._engine.links[0]
        request, refused = link.request, []

        def no_room(message, tensors, wants, *others):
            if type(message).__name__ == "Store" and not refused:
                futures = request(message, tensors, wants, *others)
                futures[""].result()
                link.forget(weights=(message.weight,))
                refused.append(message)
                raise WorkerOutOfMemoryError("worker local: no room")
            return request(message, tensors, wants, *others)

        link.request = no_room
        x = torch.randn(2, 4096)
        with pytest.raises(WorkerOutOfMemoryError, match="no room"):
            model(x)
        torch.testing.assert_close(model(x), nn.functional.linear(x, model.weight, model.bias), rtol=1e-3, atol=1e-4)


def test_gradients_that_nobody_asks_for_do_not_pile_up(connect):
    session = connect(scheme="tempo")
    model, x = session.protect(nn.Linear(16, 16)), torch.randn(4, 16, requires_grad=True)
    for _ in range(6):
        torch.autograd.grad(model(x).sum(), x)
    model(x)  # answers to nobody are let go with the next request
    link = session._engine.links[0]
    assert len(link.buffers._replies) <= 1


def test_pixels_count_as_rows_when_masks_expire(connect):
    session = connect(scheme="tempo", rekey_rows=64)
    model = session.protect(nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(1, 4, 8, 8))
    assert session.stats().encryptions["w"] == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_change_behind_the_version_counter_is_noticed(dtype):
    torch.manual_seed(0)
    w = torch.randn(24, 40).to(dtype)
    for _ in range(100):
        before = Fingerprint(w)
        assert before == Fingerprint(w)
        changed = w.clone()
        a, b = torch.randperm(40)[:2].tolist()
        changed[:, [a, b]] = changed[:, [b, a]]
        assert Fingerprint(changed) != before
    single = w.clone()
    single[3, 5] = torch.nextafter(single[3, 5].float(), torch.tensor(9.0)).to(dtype) + single[3, 5] / 64
    assert Fingerprint(single) != Fingerprint(w)


def test_what_a_worker_says_of_itself_cannot_format_the_report(connect):
    session = connect()
    link = session._engine.links[0]
    link.welcome = msgspec.structs.replace(link.welcome, device="cpu [/] [red]")
    session.protect(nested())
    assert "cpu [/] [red]" in str(session.summary())


def test_raw_input_convolutions_stay_home_in_auto_and_warn_in_all(connect):
    model = nn.Sequential(nn.Conv2d(8, 3, 1), nn.GELU(), nn.Conv2d(3, 8, 3))
    session = connect(placement="auto")
    session.protect(copy.deepcopy(model))
    assert all("first convolution" in (line.reason) for line in session.summary().lines)
    with pytest.warns(ProtectionWarning, match="near-raw input"):
        connect(placement="all").protect(copy.deepcopy(model))


def test_sign_keeping_schemes_say_so_for_every_network(connect):
    with pytest.warns(ProtectionWarning, match="keep zeros and signs"):
        connect(scheme="tempo").protect(nested())


def test_known_origin_is_called_a_public_base(connect):
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **size))
    model.config._name_or_path = "google/vit-base-patch16-224"
    with pytest.warns(ProtectionWarning, match="public checkpoint"):
        connect(scheme="tempo").protect(model)


def test_a_checkpoint_does_not_choose_where_inputs_go():
    session = {"workers": ["evil:7070"], "scheme": "insecure-plain", "insecure_no_tls": True, "trusted": ["head"]}
    state = {"recipe": {"model": {"name": "mlp"}, "run": {"steps": 1}, "session": session}}
    found = Checkpoint(Path("somebody"), 1, {}, state)
    adopted = recipe_of(found).session
    assert adopted.workers == ()
    assert adopted.scheme == Settings().scheme
    assert not adopted.insecure_no_tls
    assert adopted.trusted == ("head",)
    chosen = recipe_of(found, ['session.workers=["mine:7070"]', "session.scheme=insecure-plain"]).session
    assert (list(chosen.workers), chosen.scheme) == (["mine:7070"], "insecure-plain")

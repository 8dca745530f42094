"""Secret initial weights: the same distribution, an order that no seed gives, a model that is recognised by them."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tempo import secret_initialisation
from tempo.errors import SettingsError
from tempo.initial import origin


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 5))


def test_entries_are_kept_and_their_places_are_not():
    plain = network()
    state = torch.get_rng_state()
    model = secret_initialisation(network())
    assert torch.equal(torch.get_rng_state(), state)
    for (name, before), after in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)
        if before.dim() > 1:
            # A random order leaves about one entry in its place.
            assert int((before == after).sum()) <= 12, name
        else:
            assert torch.equal(before, after)


def test_the_same_seed_gives_other_weights_every_time():
    first, second = (secret_initialisation(network()) for _ in range(2))
    assert not torch.equal(first[2].weight, second[2].weight)


def test_who_knows_the_seed_knows_nothing_of_where_an_entry_went():
    known = network()[2].weight.detach()

    def correlation(other: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([known.flatten(), other.detach().flatten()]))[0, 1])

    assert correlation(network()[2].weight) > 0.999  # the control: a seed alone gives everything away
    # Independent entries correlate by about 1/√n: 1536 of them.
    assert abs(correlation(secret_initialisation(network())[2].weight)) < 0.15


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), zeros=st.floats(0, 1), seed=st.integers(0, 99))
def test_zeros_stay_where_they_are(rows, columns, zeros, seed):
    torch.manual_seed(seed)
    model = nn.Linear(columns, rows, bias=False)
    with torch.no_grad():
        model.weight *= torch.rand_like(model.weight) >= zeros
    before = model.weight.detach().clone()
    secret_initialisation(model)
    assert torch.equal(model.weight == 0, before == 0)
    assert torch.equal(model.weight.flatten().sort().values, before.flatten().sort().values)


def test_padding_tied_and_frozen_parameters_and_memory_formats():
    table, head = nn.Embedding(64, 8, padding_idx=3), nn.Linear(8, 64, bias=False)
    head.weight = table.weight
    fixed = nn.Linear(8, 8)
    fixed.weight.requires_grad_(False)
    convolution = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    kept = fixed.weight.clone()
    model = secret_initialisation(nn.ModuleList([table, head, fixed, convolution]))
    assert head.weight is table.weight
    assert torch.equal(table.weight[3], torch.zeros(8))
    assert torch.equal(fixed.weight, kept)
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert origin(table).base == "secret"
    assert origin(model).base == "public"  # the frozen layer is known to who knows the seed


def test_auto_recognises_only_weights_that_tempo_made_secret():
    model = network()
    assert origin(model).base == "public"
    assert "nothing is known" in origin(model).why
    secret_initialisation(model)
    assert origin(model) == origin(copy.deepcopy(model)) == origin(model.to(memory_format=torch.channels_last))
    assert origin(model).base == "secret"
    assert origin(nn.Sequential(model, nn.Linear(5, 5))).base == "public"
    model.load_state_dict(network().state_dict())
    assert origin(model).base == "public"


def test_any_later_change_counts_as_public_again():
    model = secret_initialisation(network())
    model[4].weight.data[0, 0] += 1e-6
    assert origin(model).base == "public"


def test_identities_hide_nothing_and_constants_need_not():
    model = secret_initialisation(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    nn.init.zeros_(model[1].weight)
    assert origin(model).base == "secret"
    nn.init.eye_(model[1].weight)
    assert origin(secret_initialisation(model)).base == "public"


@pytest.mark.parametrize("base", ["public", "secret"])
def test_what_the_user_says_counts(base):
    assert origin(network(), base).base == base
    assert origin(network(), base).why == f"base='{base}' was given"


def pretrained() -> nn.Module:
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, **size))
    assert not origin(model).known_public
    model.config._name_or_path = "google/vit-base-patch16-224"
    return model


@pytest.mark.parametrize("base", ["auto", "public", "secret"])
def test_a_checkpoint_is_known_as_a_public_base_whatever_is_said(base):
    found = origin(nn.Sequential(pretrained()), base)
    assert found.known_public
    assert found.base == ("secret" if base == "secret" else "public")
    assert ("google/vit-base-patch16-224" in found.why) == (base == "auto")


def test_a_loaded_model_is_not_destroyed():
    model = pretrained()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SettingsError, match="'google/vit-base-patch16-224', and shuffling would destroy them"):
        secret_initialisation(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(SettingsError, match=r"'0\.weight' is lazy"):
        secret_initialisation(nn.Sequential(nn.LazyLinear(3)))

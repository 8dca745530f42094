"""The settings schema: one for `connect`, recipes and the command line; errors say what to write instead."""

from __future__ import annotations

import pytest

import tempo
from tempo.errors import SettingsError
from tempo.settings import Settings, parse


def test_nothing_given_is_the_defaults():
    assert parse({}) == Settings()


@pytest.mark.parametrize("name", Settings.__struct_fields__)
def test_every_field_is_accepted_with_dashes_and_underscores(name):
    value = getattr(Settings(), name)
    assert parse({name: value}) == parse({name.replace("_", "-"): value}) == Settings()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("shceme", "scheme"),
        ("placment", "placement"),
        ("wire_dtypes", "wire_dtype"),
        ("local-worker", "local_workers"),
        ("insecure_notls", "insecure_no_tls"),
        ("rekey-row", "rekey_rows"),
    ],
)
def test_a_typo_names_the_nearest_field(given, meant):
    with pytest.raises(SettingsError, match=rf"^\[session\]: unknown setting .*did you mean '{meant}'\?$"):
        parse({given: 1}, "[session]")


def test_a_name_like_no_other_lists_them_all():
    with pytest.raises(SettingsError) as caught:
        parse({"xyzzy": 1})
    assert all(name in str(caught.value) for name in Settings.__struct_fields__)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("placement", "some"),
        ("wire_dtype", "int4"),
        ("rekey_rows", 0),
        ("local_workers", 65),
        ("local_workers", "two"),
        ("request_timeout", 0),
        ("request_timeout", float("nan")),
        ("insecure_no_tls", 1),
        ("trusted", "head"),
        ("divide_flops", 0.5),
    ],
)
def test_a_value_that_does_not_fit_names_its_field(field, value):
    with pytest.raises(SettingsError, match=rf"^connect\(\): .*\$\.{field}"):
        parse({field: value})


def test_a_wrong_value_starts_no_worker():
    with pytest.raises(SettingsError, match="did you mean 'scheme'"):
        tempo.connect(schema="tempo")
    with pytest.raises(SettingsError, match="did you mean 'tempo'"):
        tempo.connect(scheme="temppo")
    with pytest.raises(SettingsError, match="not both"):
        tempo.connect(settings=Settings(), scheme="tempo")


def test_settings_cannot_be_changed_under_a_session():
    with pytest.raises(AttributeError):
        Settings().scheme = "insecure-plain"

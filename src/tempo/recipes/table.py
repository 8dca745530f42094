"""Strict tables: TOML to typed structs; every mistake is named with its file, table and the nearest valid key."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from tempo.errors import SettingsError, nearest

T = TypeVar("T")


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every table of a recipe."""


def read(file: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Parse ``file`` as TOML and lay ``table.key=value`` overrides over it."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: cannot read the recipe: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: not valid TOML: {error}") from None
    return override(values, overrides)


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return ``values`` with each ``table.key=value`` set; a value that is not TOML counts as a string."""
    result = {name: dict(table) if isinstance(table, Mapping) else table for name, table in values.items()}
    for text in overrides:
        path, equals, value = text.partition("=")
        table, dot, key = path.strip().partition(".")
        if not (equals and dot and table and key):
            raise SettingsError(f"--set {text!r}: write it as table.key=value, for example optimizer.lr=0.01")
        inner = result.setdefault(table, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"--set {text!r}: {table!r} is not a table of the recipe")
        try:
            inner[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            inner[key] = value
    return result


def convert(values: Mapping[str, Any], kind: type[T], where: str) -> T:
    """Turn plain ``values`` into the struct ``kind``.

    Args:
        values: Tables of keys and values; dashes in keys count as underscores.
        kind: A struct of tables; a table may be a union of structs that are told apart by their ``name``.
        where: Where the values come from, for the error.

    Raises:
        SettingsError: A table or key is unknown or missing, or a value does not fit.
    """
    plain = _underscored(values)
    _check(plain, inspect.type_info(kind), where, "")
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{where}: {str(error).replace('$.', '')}") from None


def differences(now: Table, then: Table, keys: Mapping[str, Iterable[str] | None]) -> list[str]:
    """Where two recipes differ, as ``table.key: now, then`` lines.

    Args:
        now: The recipe that is given.
        then: The one in a checkpoint.
        keys: What to compare: tables, and of each some keys, or None for all.
    """
    present, past = msgspec.to_builtins(now), msgspec.to_builtins(then)
    return [
        f"{table}.{key}: now {present[table].get(key)!r}, in the checkpoint {past[table].get(key)!r}"
        for table, some in keys.items()
        for key in ({**past[table], **present[table]} if some is None else some)
        if present[table].get(key) != past[table].get(key)
    ]


def _underscored(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    return {key.replace("-", "_"): _underscored(value) for key, value in values.items()}


def _check(values: Any, kind: inspect.Type, where: str, table: str) -> None:
    """Find unknown names before msgspec does, to say which name was probably meant."""
    if not isinstance(values, dict):
        return
    place = f"{where}: [{table}]" if table else where
    if isinstance(kind, inspect.UnionType):
        variants = {str(kind.tag): kind for kind in kind.types if isinstance(kind, inspect.StructType)}
        name = values.get("name")
        if name is None:
            raise SettingsError(f"{place}: 'name' is missing; valid are: {', '.join(sorted(variants))}")
        if name not in variants:
            raise SettingsError(f"{place}: unknown name {name!r}; {nearest(str(name), variants)}")
        kind = variants[name]
    if not isinstance(kind, inspect.StructType):
        return
    fields = {field.name: field for field in kind.fields}
    for name, value in values.items():
        if name in fields:
            _check(value, fields[name].type, where, f"{table}.{name}" if table else name)
        elif name != kind.tag_field:
            what = f"unknown key {name!r}" if table else f"unknown table [{name}]"
            raise SettingsError(f"{place}: {what}; {nearest(name, fields)}")
    for name, field in fields.items():
        if field.required and name not in values:
            raise SettingsError(f"{place}: {f'key {name!r}' if table else f'table [{name}]'} is missing")

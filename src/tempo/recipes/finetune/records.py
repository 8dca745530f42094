"""Private text from a file of JSON lines.

All lines of a file have the same fields, of these, and others are ignored:

* ``text``: all of it is learned.
* ``prompt`` and ``completion``: what is asked and what is answered; only the answer is learned.
* ``messages``: a conversation, a list of ``{"role": ..., "content": ...}``; only what the assistant says is learned.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from tempo.errors import DataError

KINDS: Final = (("text",), ("prompt", "completion"), ("messages",))


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: str
    content: str


class _Line(msgspec.Struct, frozen=True):
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: list[Message] | None = None


@dataclass(frozen=True)
class Record:
    """One line of the file."""

    where: str
    """File and line, for errors."""

    fields: dict[str, Any]
    """Of one of `KINDS`."""


def read(file: Path) -> list[Record]:
    """All lines of ``file`` but empty ones.

    Raises:
        DataError: It cannot be read, or a line does not fit; names the line and the field.
    """
    lines = _content(file).split(b"\n")
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _record(line, f"{file}:{number}")
        if records and record.fields.keys() != records[0].fields.keys():
            raise DataError(
                f"{record.where}: has {_named(record.fields)}, and the first line {_named(records[0].fields)}: "
                "all lines of a file must have the same"
            )
        records.append(record)
    if not records:
        raise DataError(f"{file}: holds no line")
    return records


def digest(file: Path) -> str:
    """SHA-256 of ``file``, to tell whether it still holds what a run began with."""
    return hashlib.sha256(_content(file)).hexdigest()


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot read: {error.strerror}") from None


def _record(line: bytes, where: str) -> Record:
    try:
        found = msgspec.json.decode(line, type=_Line)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        field = path.strip("`.")
        raise DataError(f"{where}: {f'field {field!r}: ' if field else ''}{what}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    given = {name: value for name in _Line.__struct_fields__ if (value := getattr(found, name)) is not None}
    kinds = [kind for kind in KINDS if set(kind) <= given.keys()]
    if len(kinds) != 1:
        if missing := {"prompt": "completion", "completion": "prompt"}.get("".join(given)):
            raise DataError(f"{where}: field {missing!r} is missing beside {_named(given)}")
        choice = "'text', or 'prompt' and 'completion', or 'messages'"
        raise DataError(f"{where}: has {_named(given) or 'none of the fields'}; give {choice}, and no two of these")
    fields = {name: given[name] for name in kinds[0]}
    empty = next((name for name, value in fields.items() if not value and name != "prompt"), None)
    if empty is not None:
        raise DataError(f"{where}: field {empty!r} is empty")
    if "messages" in fields:
        if not any(message.role == "assistant" for message in fields["messages"]):
            raise DataError(f"{where}: field 'messages' has no message of role 'assistant', and so nothing to learn")
        fields["messages"] = msgspec.to_builtins(fields["messages"])
    return Record(where, fields)


def _named(fields: Any) -> str:
    return " and ".join(map(repr, fields))

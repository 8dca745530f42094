"""Private text from JSON lines: what is read, and what an error names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempo.errors import DataError
from tempo.recipes.finetune.records import read

TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("fields", [{"text": "a"}, {"prompt": "", "completion": "b"}, {"messages": TURNS}])
def test_each_kind_of_line_is_read_and_other_fields_are_ignored(tmp_path: Path, fields: dict[str, Any]) -> None:
    file = write(tmp_path, {**fields, "id": 7}, "", fields)
    first, second = read(file)
    assert first.fields == second.fields == fields
    assert (first.where, second.where) == (f"{file}:1", f"{file}:3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "Expected `object`, got `array`"),
        ({"text": 3}, "field 'text': Expected `str | null`, got `int`"),
        ({"text": ""}, "field 'text' is empty"),
        ({"texts": "a"}, "has none of the fields; give 'text', or 'prompt' and 'completion', or 'messages'"),
        ({"text": "a", "messages": TURNS}, "has 'text' and 'messages'; give"),
        ({"prompt": "a"}, "field 'completion' is missing beside 'prompt'"),
        ({"completion": "a"}, "field 'prompt' is missing beside 'completion'"),
        ({"messages": TURNS[:1]}, "field 'messages' has no message of role 'assistant'"),
        ({"messages": [{"role": "user"}]}, r"field 'messages\[0\]': Object missing required field `content`"),
        ({"messages": [{**TURNS[0], "tool": 1}]}, r"field 'messages\[0\]': Object contains unknown field `tool`"),
        ({"text": "a"}, "has 'text', and the first line 'prompt' and 'completion'"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: Any, message: str) -> None:
    file = write(tmp_path, {"prompt": "a", "completion": "b"}, line)
    with pytest.raises(DataError, match=f"data.jsonl:2: .*{message}"):
        read(file)


def test_a_file_that_is_not_there_or_empty_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl: cannot read: No such file"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="holds no line"):
        read(write(tmp_path, "", " "))

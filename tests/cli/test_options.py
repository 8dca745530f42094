"""Options that several commands share."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tempo.cli import app
from tempo.cli.options import overrides, spread

ADDRESSES = ["gpu-a:7070@one", "[fe80::1]:7070", "unix:/run/w.sock@two", "group:gpu-b:7071"]


@pytest.mark.parametrize("separator", [" ", ",", ", ", " , "])
def test_workers_are_given_with_spaces_or_commas_and_what_follows_them_is_left(separator):
    words = ["base", "--workers", *separator.join(ADDRESSES).split(), "data.jsonl", "--steps", "3", "x:1"]
    found = spread(words)
    values = [value for option, value in pairwise(found) if option == "--workers"]
    assert overrides(None, values) == ["session.workers=" + str(ADDRESSES).replace("'", '"')]
    assert found[-4:] == ["data.jsonl", "--steps", "3", "x:1"]


@pytest.mark.parametrize(
    "words",
    [
        ["--workers", "a:1", "--", "b:2"],  # what comes after -- is no option's
        ["--", "--workers", "a:1", "b:2"],
        ["--workers", "2", "b:2"],  # of `tempo audit`: a number
        ["--workers", "a:1", "image.png", "b:2"],
        ["--workers", "a", "b:2"],  # misspelt: the command says so
        ["--workers=a:1", "b:2"],
        ["--workers"],
    ],
)
def test_nothing_else_is_taken_for_workers(words):
    assert spread(words) == words


@given(st.lists(st.sampled_from(["--workers", "--", "-x", "a:1", "b:2,c:3", ",", "word", ""])))
def test_words_keep_their_order_and_none_is_lost(words):
    found = spread(words)
    assert [word for word in found if word != "--workers"] == [word for word in words if word != "--workers"]
    assert spread(found) == found


@pytest.mark.parametrize("command", ["train", "evaluate", "profile"])
def test_commands_take_several_workers_before_what_they_work_on(command, tmp_path):
    result = CliRunner().invoke(app, [command, "--workers", *ADDRESSES, str(tmp_path / "none.toml")])
    assert result.exit_code == 1
    assert "none.toml" in result.output

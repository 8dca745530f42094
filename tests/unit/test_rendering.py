"""Tables as plain text, wherever Python runs."""

from __future__ import annotations

import pytest
from rich import console
from rich.table import Table

from tempo.rendering import plain_text


@pytest.mark.parametrize("notebook", [False, True])
def test_text_is_returned_in_notebooks_too(monkeypatch: pytest.MonkeyPatch, notebook: bool) -> None:
    """There rich would show it itself, and leave nothing to return."""
    monkeypatch.setattr(console, "_is_jupyter", lambda: notebook)
    table = Table("layer")
    table.add_row("fc")
    assert [line.strip("┃│ ") for line in plain_text(table).splitlines()][1::2] == ["layer", "fc"]

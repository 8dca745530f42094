"""Turns rich tables into plain text, for ``print`` and logs."""

from __future__ import annotations

from io import StringIO

from rich.console import Console, RenderableType


def plain_text(renderable: RenderableType, width: int = 120) -> str:
    """``renderable`` as lines of text without colours."""
    out = StringIO()
    Console(file=out, width=width, color_system=None, force_jupyter=False).print(renderable)
    return out.getvalue().rstrip("\n")

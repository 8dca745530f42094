"""Train and run neural networks on GPUs that nobody has to trust.

Names are loaded on first use, so that `tempo.worker` can be imported without any code that holds a key.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tempo.initial import secret_initialisation
    from tempo.session import Session, connect
    from tempo.settings import Settings

__version__ = "0.1.0"
__all__ = ["Session", "Settings", "__version__", "connect", "secret_initialisation"]

_HOME = {
    "Session": "tempo.session",
    "Settings": "tempo.settings",
    "connect": "tempo.session",
    "secret_initialisation": "tempo.initial",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tempo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

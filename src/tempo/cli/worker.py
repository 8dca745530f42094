"""``tempo worker``: the untrusted server."""

from tempo.worker.__main__ import worker

__all__ = ["worker"]

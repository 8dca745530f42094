"""Optimizers that PyTorch does not have, or not exactly as a worker needs them; ordinary ones for any parameters.

They step by the same arithmetic as a worker does on weights that live there (`tempo.worker.update`).
"""

from __future__ import annotations

from tempo.optim.lion import Lion
from tempo.optim.muon import Muon

__all__ = ["Lion", "Muon"]

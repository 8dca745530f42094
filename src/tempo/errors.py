"""Every exception a user can meet.

A message says what happened, where (layer, worker, file, field) and what to do about it. None carries a secret:
no tensor values, no keys, no masks.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Self


class TempoError(Exception):
    """Base of every error that Tempo raises on purpose."""


class ProtectionWarning(UserWarning):
    """What was asked works, but is known not to protect something, or protects it at a price. Says what and why."""


class SettingsError(TempoError, ValueError):
    """A setting, flag or recipe field is unknown, of the wrong type or out of range."""


class AddressError(SettingsError):
    """A worker address does not follow ``[group:]host:port[@operator]`` or ``unix:path[@operator]``."""


class SchemeError(TempoError):
    """The scheme cannot do what was asked: too few workers, an update place or a layer it does not support."""


class UnsafeError(TempoError):
    """What was asked would undo the protection: a session used after a fork, say."""


class SessionClosedError(TempoError):
    """The session was closed, so nothing can be computed under it any more."""


class NonFiniteError(TempoError, FloatingPointError):
    """A tensor about to be masked holds NaN or infinity. Names the layer and the operand."""


class IdentityError(TempoError):
    """A key pair or a peer's certificate is missing, unreadable or not trusted."""


class ProtocolError(TempoError):
    """The other end of a connection broke the wire protocol, and the connection was closed."""


class WorkerError(TempoError):
    """Something went wrong at, or on the way to, one worker. Names its address.

    Attributes:
        worker: Its number in the session, where it is one of a session's.
    """

    worker: int | None = None

    def bare(self) -> Self:
        """A copy to keep: one that was raised knows frames, and so every tensor of that moment, while it lives."""
        copy = type(self)(*self.args)
        copy.worker = self.worker
        return copy

    def named(self, layer: str, worker: int) -> Self:
        """The same, about a layer and the worker with this number."""
        copy = type(self)(f"layer {layer!r}: {self}")
        copy.worker = worker
        return copy


class WorkerUnreachableError(WorkerError):
    """No connection could be made."""


class WorkerRefusedError(WorkerError):
    """The worker was reached but refused: unknown certificate, other protocol version, missing capability."""


class WorkerLostError(WorkerError):
    """The connection broke while requests were in flight."""


class WorkerOutOfMemoryError(WorkerError):
    """The worker's memory limit, or its device, is exhausted."""


class WorkerFailedError(WorkerError):
    """The worker answered a request with an error of its own."""


class WorkerLacksWeightError(WorkerFailedError):
    """The worker was asked for a public weight by its digest, and has none like it: it has to be sent."""


class WorkerLiedError(WorkerError):
    """An answer of the worker failed verification: it computed something else. Names layer, step and residual."""


class WeightAwayError(TempoError, RuntimeError):
    """A weight or gradient was read that lives on a worker (``update="worker"``). Says what to call instead."""


class WeightsLostError(WorkerError):
    """A worker is gone, and with it weights that lived on it. Load a checkpoint to go on."""


class UpdateError(TempoError):
    """An optimizer cannot run on masked weights, or not be verified there. Names those that can."""


class CheckpointError(TempoError):
    """A checkpoint is missing, damaged, of another model, or could not be written."""


class AuditError(TempoError):
    """A transcript, truth or report is missing, damaged, or of another version. Names the file."""


class DataError(TempoError):
    """A data source is unknown, missing or malformed. Says what to put where."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint for an unknown ``name``: the nearest valid one if any is close, else all of them.

    Examples:
        >>> nearest("temppo", ["tempo", "mix"])
        "did you mean 'tempo'?"
    """
    names = sorted(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid are: {', '.join(names)}"

"""What every run has in common, whatever it trains: how it begins, breaks off, is timed and ends."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self, final

from rich.console import Console

from tempo.checkpoint import Checkpoint, CheckpointStore
from tempo.errors import CheckpointError, NonFiniteError, SettingsError, TempoError
from tempo.recipes.inference import FOLDER

if TYPE_CHECKING:
    from tempo.session import Session
    from tempo.summary import Summary


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    step: int
    signal: int = 0
    """What interrupted it; 0: nothing, it is complete."""

    loss: float = math.nan
    accuracy: float = math.nan


@final
class Interrupts:
    """Turns Ctrl-C and SIGTERM into a flag while inside, so that the step in progress is finished and saved."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:  # asked twice: at once, then, without a checkpoint
            raise KeyboardInterrupt
        self.signal = number


@final
class Stopwatch:
    """Says where the time of one step went, from its making on.

    Args:
        session: What the step runs under, if under any.
    """

    def __init__(self, session: Session | None) -> None:
        self._session = session
        self._before = session.stats() if session is not None else None
        self._started = time.perf_counter()

    def split(self) -> tuple[dict[str, float], int, int]:
        """Seconds by place, bytes sent and bytes received so far."""
        took = time.perf_counter() - self._started
        if self._session is None or self._before is None:
            return {"trusted": took}, 0, 0
        used = self._session.stats() - self._before
        seconds = {**used.seconds, "trusted": max(0.0, took - sum(used.seconds.values()))}
        return seconds, used.bytes_sent, used.bytes_received


def continued(store: CheckpointStore, console: Console, differences: Callable[[Checkpoint], list[str]]) -> Checkpoint:
    """The newest checkpoint in ``store``, to continue from.

    Args:
        store: Of the run.
        console: Where to say what is continued, and what is damaged.
        differences: What keeps a run from continuing it exactly, line by line.

    Raises:
        CheckpointError: There is none.
        SettingsError: It was made by another recipe.
    """
    if not store.steps():
        raise CheckpointError(f"nothing to resume in {store.folder}: leave out --resume to start")
    found = store.load()
    for message in found.damaged:
        console.print(f"[yellow]passed over:[/] {message}", soft_wrap=True)
    if lines := differences(found):
        raise SettingsError(
            f"{found.path} was made by another recipe, and a resumed run must continue exactly:"
            + "".join(f"\n  {line}" for line in lines)
            + "\nchange that back, or start a new run with another --out"
        )
    console.print(f"continuing from {found.path}", soft_wrap=True, highlight=False)
    return found


def make_way(folder: Path, console: Console) -> None:
    """Move an earlier run out of the way instead of mixing with it or deleting it."""
    if not any((folder / name).exists() for name in ("metrics.jsonl", FOLDER)):
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    try:
        folder.rename(aside)
    except OSError as error:
        raise CheckpointError(f"{folder} holds an earlier run ({error.strerror}); choose another --out") from None
    console.print(f"{folder} held an earlier run, now in {aside}", soft_wrap=True, highlight=False)


def placed(summary: Summary) -> str:
    """What masks the model, and where its layers went."""
    sent = sum(1 for line in summary.lines if line.offloaded)
    return (
        f"{'; '.join(map(str, summary.models))}\n"
        f"{sent} of {len(summary.lines)} layers, {summary.offloaded_share:.1%} of their FLOPs, go to "
        f"{'; '.join(summary.workers)}"
    )


def save_after(error: TempoError, save: Callable[[], None], store: CheckpointStore) -> None:
    """Save what there is and say so on ``error``; after NaN or infinity there is nothing worth saving."""
    if not isinstance(error, NonFiniteError):
        try:
            save()
        except TempoError as other:
            if str(other) != str(error):
                error.add_note(str(other))
    if steps := store.steps():
        error.add_note(f"Step {steps[-1]} is saved in {store.folder}; continue with --resume.")

"""What a person sees of a run: a live display on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Final, Self, final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from tempo.recipes.metrics import Evaluation, Step

_LINES: Final = 20
"""Progress lines of a whole run where there is no terminal."""

_WINDOW: Final = 20
"""Steps that the figures shown are averaged over."""

_PLACES: Final = {"mask": "mask", "verify": "check", "wire": "wire", "worker": "worker", "trusted": "trusted layers"}


@final
class Display:
    """Shows the steps of a run, as a context manager.

    Args:
        console: Where to.
        title: Name of the run.
        start: Steps already done.
        steps: Steps in all.
        batch_size: Samples per step.
        measured_on: What evaluations are of.
    """

    def __init__(
        self, console: Console, title: str, start: int, steps: int, batch_size: int, measured_on: str = "test"
    ) -> None:
        self._console = console
        self._measured_on = measured_on
        self._steps = steps
        self._batch_size = batch_size
        self._recent: deque[Step] = deque(maxlen=_WINDOW)
        self._every = max(1, steps // _LINES)
        self._bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
        )
        self._task = self._bar.add_task(title, total=steps, completed=start, left="")
        self._live = Live(self._bar, console=console, refresh_per_second=4) if console.is_terminal else None

    def step(self, record: Step) -> None:
        """Show one more step."""
        self._recent.append(record)
        if self._live is not None:
            self._bar.update(self._task, completed=record.step, left=f"{self._left(record.step)} left")
            self._live.update(Group(self._bar, Text(self._figures()), Text(self._split())))
        elif record.step == 1 or record.step % self._every == 0 or record.step == self._steps:
            parts = (f"step {record.step}/{self._steps}", self._figures(), self._split())
            left = f"{self._left(record.step)} left" if record.step < self._steps else ""
            self.note("  ".join(part for part in (*parts, left) if part))

    def evaluation(self, record: Evaluation) -> None:
        """Show an evaluation."""
        self.note(f"{self._measured_on} at step {record.step}: loss {record.loss:.4f}  accuracy {record.accuracy:.1%}")

    def note(self, text: str) -> None:
        """Show a line."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _figures(self) -> str:
        last = self._recent[-1]
        loss, accuracy = (
            sum(values) / len(self._recent) for values in zip(*((step.loss, step.accuracy) for step in self._recent))
        )
        speed = self._batch_size / self._pace()
        return f"loss {loss:.4f}  accuracy {accuracy:.1%}  {speed:.0f} samples/s  lr {last.lr:.2g}"

    def _split(self) -> str:
        seconds = {place: sum(step.seconds.get(place, 0.0) for step in self._recent) for place in _PLACES}
        total = sum(seconds.values())
        if not total or seconds["trusted"] == total:
            return ""
        return "time: " + "  ".join(f"{_PLACES[place]} {value / total:.0%}" for place, value in seconds.items())

    def _pace(self) -> float:
        """Seconds per step."""
        return max(1e-9, sum(sum(step.seconds.values()) for step in self._recent) / len(self._recent))

    def _left(self, step: int) -> str:
        seconds = round((self._steps - step) * self._pace())
        return time.strftime("%H:%M:%S" if seconds >= 3600 else "%M:%S", time.gmtime(seconds))

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

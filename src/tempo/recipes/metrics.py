"""What a run records: one JSON line per step in ``metrics.jsonl``, and the same for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, final

import msgspec

from tempo.errors import CheckpointError

_FILE: Final = "metrics.jsonl"


class Step(msgspec.Struct, frozen=True, tag_field="kind", tag="step"):
    """One training step. ``seconds`` splits its time into mask, wire, worker and trusted."""

    step: int
    loss: float
    accuracy: float
    lr: float
    time: float
    seconds: dict[str, float]
    bytes_sent: int = 0
    bytes_received: int = 0


class Evaluation(msgspec.Struct, frozen=True, tag_field="kind", tag="evaluation"):
    """Loss and accuracy on the test images after ``step``."""

    step: int
    loss: float
    accuracy: float
    time: float


Record = Step | Evaluation


@final
class Metrics:
    """Writes the records of a run, as a context manager.

    Args:
        folder: The run's folder.
        step: Steps already done: what a run that broke off recorded beyond them is dropped, since it comes again.
        evaluated: Whether the evaluation after ``step`` is done too; otherwise it comes again.
    """

    def __init__(self, folder: Path, step: int = 0, *, evaluated: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._evaluated = evaluated
        self._start(step)

    def go_back(self, step: int) -> None:
        """Drop what is recorded beyond ``step``: it comes again."""
        self._close()
        self._start(step)

    def _start(self, step: int) -> None:
        folder = self._folder
        path = folder / _FILE
        kept = [record for record in read(folder) if record.step <= step] if path.exists() else []
        if kept and isinstance(kept[-1], Evaluation) and kept[-1].step == step and not self._evaluated:
            kept.pop()
        path.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in kept))
        self._file = path.open("ab")
        self._board = _tensorboard(folder, step)

    def write(self, record: Record) -> None:
        """Record a step or an evaluation.

        Raises:
            CheckpointError: The disk is full.
        """
        try:
            self._file.write(msgspec.json.encode(record) + b"\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name}: cannot write: {error.strerror}. Make room, then resume"
            ) from None
        if self._board is None:
            return
        part = "train" if isinstance(record, Step) else "test"
        self._board.add_scalar(f"{part}/loss", record.loss, record.step)
        self._board.add_scalar(f"{part}/accuracy", record.accuracy, record.step)
        if isinstance(record, Step):
            self._board.add_scalar("train/lr", record.lr, record.step)
            for name, seconds in record.seconds.items():
                self._board.add_scalar(f"seconds/{name}", seconds, record.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read(folder: Path) -> list[Record]:
    """All records of the run in ``folder``; a last line that was cut off by a crash is left out."""
    records: list[Record] = []
    for line in (folder / _FILE).read_bytes().splitlines():
        try:
            records.append(msgspec.json.decode(line, type=Record))
        except msgspec.DecodeError:
            break
    return records


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # part of the extra `recipes`; metrics.jsonl holds the same
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

"""An answer that came, with its check: see `tempo.schemes.reply`."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from torch import Tensor

from tempo import kernels
from tempo.errors import WorkerLiedError
from tempo.schemes.reply import Reply, Unmask, Watch
from tempo.verify.checks import AnswerCheck, Residual
from tempo.verify.norms import lost
from tempo.verify.sums import Sums
from tempo.wire.layout import is_last

if TYPE_CHECKING:
    from tempo.engine.engine import Engine


@final
class Received(Reply):
    """What worker number ``worker`` answered under ``name``; used as it is where there is no check.

    Args:
        engine: Whose.
        worker: Its number.
        name: What it is.
        layer: Whose it is, for messages and traces.
        tensor: As it came; `release` gives it back.
        check: Its check, or None.
    """

    def __init__(
        self,
        engine: Engine,
        worker: int,
        name: str,
        layer: str,
        tensor: Tensor,
        check: AnswerCheck | None,
    ) -> None:
        self.shape = tensor.shape
        self._engine, self._worker, self._link = engine, worker, engine.links[worker]
        self._name, self._layer = name, layer
        self._tensor, self._check = tensor, check

    def checked(self) -> Tensor:
        """The answer, after its check, which reads a copy where it lay in shared memory."""
        check, self._check = self._check, None
        if check is not None:
            with self._engine.stats.timed("verify", self._name, self._layer):
                came, into = self._tensor, self._room()
                try:
                    residual = check.judge(came, into)
                finally:
                    if into is not None:
                        self._tensor = into
                        self._link.buffers.release(came)
                self._judge(residual)
        return self._tensor

    def read(self, unmask: Unmask) -> None:
        """Where the kernels can sum what they read, where it lies; else the answer after its check."""
        check = self._check
        if check is not None and check.vectors is not None and check.judge_sums is not None and self._watchable():
            watch = Watch.of(check.vectors, self._tensor.numel() // self._tensor.shape[1])
            unmask(self._tensor, watch=watch)
            if watch.seen:
                self._check = None
                with self._engine.stats.timed("verify", self._name, self._layer):
                    lengths = watch.lengths.add_(lost(watch.sums.dtype, watch.vectors.shape[1]))
                    self._judge(check.judge_sums(Sums(watch.sums, lengths), self._tensor.dtype))
                return
        unmask(self.checked(), watch=None)

    def wrong(self, row: int) -> WorkerLiedError:
        """Names worker, layer and step."""
        engine = self._engine
        lie = engine.verifier.lie(str(self._link.address), engine.step, self._name, self._tensor, f"row {row}")
        return lie.named(self._layer, self._worker)

    def release(self) -> None:
        """Give the memory back."""
        self._link.buffers.release(self._tensor)

    def _room(self) -> Tensor | None:
        """Where to copy it, with axes in the same order, if it may be changed where it is."""
        if not is_last(self._tensor):
            return self._link.buffers.private(self._tensor)
        room = self._link.buffers.private(self._tensor.movedim(1, -1))
        return None if room is None else room.movedim(-1, 1)

    def _watchable(self) -> bool:
        return kernels.native() is not None and self._tensor.dtype in kernels.DTYPES and self._tensor.numel() > 0

    def _judge(self, residual: Residual) -> None:
        engine = self._engine
        try:
            engine.verifier.judge(str(self._link.address), engine.step, self._name, self._tensor, residual)
        except WorkerLiedError as error:
            raise error.named(self._layer, self._worker) from error

"""Why a request is not served, while its connection goes on."""

from __future__ import annotations

from typing import final

from tempo.wire.messages import FailureCode


@final
class Refusal(Exception):  # noqa: N818 - it is an answer, not an error of this process
    """Answered to the other side as a `Failure`."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code: FailureCode = code

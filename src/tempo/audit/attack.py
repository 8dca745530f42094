"""The contract of an attack, and what comes of one."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import msgspec

from tempo.audit.knowledge import Fact, Knowledge
from tempo.audit.transcript import View
from tempo.audit.truth import Truth

Effort = Literal["quick", "full"]


class NotApplicable(Exception):  # noqa: N818 - an answer, not an error
    """The attack has nothing to work on in this transcript; says why."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One number that an attack reached, and how to read it."""

    name: str
    value: float
    leaks: float | None = None
    """From here on it counts as a leak; None for a figure that only informs."""

    higher_leaks: bool = True
    """Whether larger values leak more."""

    chance: float | None = None
    """What guessing, or knowing nothing, would reach."""

    ceiling: float | None = None
    """What an attacker with everything in clear would reach."""

    meaning: str = ""
    """One plain sentence."""

    @property
    def leaking(self) -> bool:
        """Whether the value is on the wrong side of ``leaks``."""
        if self.leaks is None:
            return False
        return self.value >= self.leaks if self.higher_leaks else self.value <= self.leaks


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """A figure over something that was varied."""

    title: str
    x_label: str
    y_label: str
    x: list[float]
    series: dict[str, list[float | None]]
    leaks: float | None = None
    """From here on it counts as a leak; `higher_leaks` says to which side, as for a `Figure`."""

    higher_leaks: bool = True
    note: str = ""


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """Pictures side by side, in rows: base64 PNG."""

    title: str
    rows: dict[str, list[str]]
    note: str = ""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What scoring says. The first figure decides whether the attack succeeded."""

    figures: list[Figure]
    curves: list[Curve] = []
    panels: list[Panel] = []


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One attack on one view, as it goes into the report."""

    attack: str
    knows: list[str]
    tries: str
    verdict: Literal["broken", "resisted", "not applicable", "not scored"]
    worker: str = ""
    reason: str = ""
    """Why it does not apply, or was not scored."""

    figures: list[Figure] = []
    curves: list[Curve] = []
    panels: list[Panel] = []
    seconds: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """A scenario: what a worker saw, what the attacker knows, and the truth to score by."""

    view: View
    knowledge: Knowledge
    truth: Truth


@dataclass(frozen=True)
class Control:
    """Something that the attack is known to break, and how well it must.

    Attributes:
        evidence: The scenario.
        figure: Name of the figure that must reach ``bound``.
        bound: At least this, or at most this where smaller values leak more.
        source: Where the bound comes from.
    """

    evidence: Evidence
    figure: str
    bound: float
    source: str


class Attack(ABC):
    """One way to undo masks. A subclass is one small file in ``attacks/`` and one line in its registry."""

    name: ClassVar[str]
    knows: ClassVar[frozenset[Fact]] = frozenset()
    """What it needs to know besides the transcript."""

    tries: ClassVar[str]
    """One sentence: what it does, and what it would recover."""

    @abstractmethod
    def recover(self, view: View, knowledge: Knowledge, effort: Effort) -> Any:
        """Attack. Never sees the truth.

        Raises:
            NotApplicable: There is nothing to work on.
        """

    @abstractmethod
    def score(self, recovered: Any, view: View, truth: Truth) -> Outcome:
        """Compare what was recovered with the truth. The first figure decides."""

    @abstractmethod
    def control(self) -> Control:
        """A scenario that the attack must break, fast enough for every test run."""

    def run(self, view: View, knowledge: Knowledge, truth: Truth | None, effort: Effort = "quick") -> Finding:
        """Attack and score."""
        started = time.perf_counter()
        about: dict[str, Any] = {
            "attack": self.name,
            "knows": sorted(self.knows),
            "tries": self.tries,
            "worker": view.worker,
        }
        try:
            recovered = self.recover(view, knowledge.only(self.knows), effort)
        except NotApplicable as reason:
            return Finding(verdict="not applicable", reason=str(reason), **about)
        if truth is None:
            return Finding(
                verdict="not scored",
                reason="no truth was given (--truth): what was recovered cannot be told from noise",
                seconds=time.perf_counter() - started,
                **about,
            )
        try:
            outcome = self.score(recovered, view, truth)
        except NotApplicable as reason:
            return Finding(verdict="not applicable", reason=str(reason), **about)
        return Finding(
            verdict="broken" if outcome.figures[0].leaking else "resisted",
            figures=outcome.figures,
            curves=outcome.curves,
            panels=outcome.panels,
            seconds=time.perf_counter() - started,
            **about,
        )

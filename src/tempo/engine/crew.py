"""The workers of a session that still take part, and what became of the others."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from tempo.engine.link import Link
from tempo.engine.recall import Recall
from tempo.errors import (
    ProtectionWarning,
    SchemeError,
    WorkerError,
    WorkerLiedError,
    WorkerLostError,
    WorkerRefusedError,
)
from tempo.schemes.base import Scheme, Target

log = logging.getLogger("tempo")


@dataclass(frozen=True, slots=True)
class Incident:
    """A worker that left a session: its address, the step, and the error that says why."""

    address: str
    step: int
    error: WorkerError

    def __str__(self) -> str:
        return f"step {self.step}: {self.error}"


class Crew:
    """Who takes part, with which share of the rows.

    Args:
        links: All workers of the session; their order is their numbering.
        shares: Of the rows, by the same numbers.
        recall: Seeks workers that were lost; without it they stay so.
        patience: Seconds to wait for one of them where nobody else is left; 0: they are not even sought.
    """

    def __init__(
        self, links: Sequence[Link], shares: Sequence[float], recall: Recall | None = None, patience: float = 0.0
    ) -> None:
        self.links = list(links)
        self.shares = list(shares)
        self._recall = recall
        self._patience = patience
        self.incidents: list[Incident] = []
        self.banned: set[str] = set()
        """Operators found lying. What was masked for one of them is masked anew for the others."""
        self._gone: set[int] = set()
        self._least = 1
        """Operators that the schemes in use need."""
        self._distinct = False
        """Whether they need every worker to be of another one."""
        self._divided = False
        """Whether any product was divided over operators."""

    @property
    def present(self) -> list[int]:
        """Numbers of the workers that take part."""
        return [number for number in range(len(self.links)) if number not in self._gone]

    def share(self, number: int) -> float:
        """Of the rows, for the worker with this number; 0 for one that left."""
        return self.shares[number] / sum(self.shares[i] for i in self.present) if number not in self._gone else 0.0

    def check(self, scheme: Scheme) -> None:
        """Raise `SchemeError` if ``scheme`` does not work with these workers."""
        traits = scheme.traits
        self._least = max(self._least, traits.min_workers)
        self._distinct |= traits.distinct_operators
        if len(self.present) < traits.min_workers:
            instead = f". {traits.with_fewer}" if traits.with_fewer else ""
            given = f"needs {traits.min_workers} workers; {len(self.present)} given"
            raise SchemeError(f"scheme {scheme.name!r} {given}{instead}")
        for number in self.present:
            link = self.links[number]
            if why := self._not_distinct(link):
                raise SchemeError(
                    f"scheme {scheme.name!r} needs workers of distinct operators; worker {link.address}: {why}"
                )

    def targets(self, number: int, rows: int, whole: bool, operators: int = 1) -> list[Target]:
        """Which workers take part in a product, and with which share of its rows.

        Args:
            number: Of the product; spreads small ones over the workers.
            rows: Of its input.
            whole: Whether rows are not worth dividing.
            operators: How many distinct operators its scheme divides it over, where there are that many.
        """
        while self._recall is not None and (back := self._recall.returned()):
            self._welcome(*back)
        if not self.present:
            last = self.incidents[-1].error
            raise type(last)(f"no worker is left: {last}; connect to others")
        everyone = [Target(i, self.links[i].address.operator, self.shares[i]) for i in self.present]
        parties = list(dict.fromkeys(target.operator for target in everyone))
        if operators > 1 and len(parties) > 1:
            self._divided = True
            chosen = [parties[(number + i) % len(parties)] for i in range(min(operators, len(parties)))]
            teams = [[target for target in everyone if target.operator == operator] for operator in chosen]
        else:
            teams = [everyone]
        whole = whole or any(rows < len(team) for team in teams)
        return [target for team in teams for target in ([team[number % len(team)]] if whole else team)]

    def dismiss(self, error: WorkerError, step: int) -> None:
        """Go on without the worker that ``error`` is about, so that what failed can be done again by the others.

        A worker that lied takes all workers of its operator with it, for good. One that was lost is sought, and takes
        part again once it is back; where nobody else is left, that is waited for.

        Args:
            error: What went wrong.
            step: When, for the record.

        Raises:
            WorkerError: ``error`` itself, where nobody would be left; only a liar is dismissed all the same.
        """
        if error.worker is None:
            raise error
        operator = self.links[error.worker].address.operator
        lied = isinstance(error, WorkerLiedError)
        if error.worker in self._gone and not (lied and operator not in self.banned):
            return  # one that lied and was lost before that showed may not come back
        leaving = [
            number
            for number in self.present
            if number == error.worker or (lied and self.links[number].address.operator == operator)
        ]
        rest = [number for number in self.present if number not in leaving]
        recall = self._recall if self._patience else None
        lost = isinstance(error, WorkerLostError)
        enough = self._enough(rest)
        if not enough and not lied and not (lost and recall):
            raise error  # a worker that is out of memory, say, may have enough for the next batch
        operators = {self.links[number].address.operator for number in self.present}
        self.incidents.append(Incident(str(self.links[error.worker].address), step, error.bare()))
        self._gone.update(leaving)
        if lied:
            self.banned.add(operator)
        for number in leaving:
            self.links[number].close()
        if lost and recall is not None:
            recall.seek(error.worker, self.links[error.worker])
        if not enough:
            self._wait_for_enough(error, recall)
            return
        left = ", ".join(str(self.links[number].address) for number in rest)
        log.error("%s; going on without it%s, with: %s", str(error), " and its operator" if lied else "", left)
        alone = len({self.links[number].address.operator for number in rest}) == 1
        if self._divided and len(operators) > 1 and alone:
            warnings.warn(
                "workers of a single operator are left: schemes that divide a layer over two operators do not any more",
                ProtectionWarning,
                stacklevel=2,
            )

    def join(self, link: Link, share: float) -> None:
        """Let one more worker take part.

        Raises:
            WorkerRefusedError: Its operator lied before: every return would be one more try. Or a scheme in use needs
                every worker to be of another operator, and it is not.
        """
        if link.address.operator in self.banned:
            link.close()
            raise WorkerRefusedError(
                f"worker {link.address}: operator {link.address.operator!r} is banned, for it lied"
            )
        if why := self._not_distinct(link):
            link.close()
            raise WorkerRefusedError(f"worker {link.address}: schemes in use need distinct operators; {why}")
        link.index = len(self.links)
        self.links.append(link)
        self.shares.append(share)

    def close(self) -> None:
        """Seek nobody any more, and close all links."""
        if self._recall is not None:
            self._recall.close()
        for link in self.links:
            link.close()

    def _welcome(self, number: int, link: Link) -> None:
        """A worker is back: under a new number, for what it held is gone."""
        try:
            self.join(link, self.shares[number])
        except WorkerRefusedError as error:
            log.warning("%s", str(error))
        else:
            log.warning("worker %s is back", link.address)

    def _not_distinct(self, link: Link) -> str:
        """Why ``link`` may be of the same operator as another worker, where that must not be; empty if it is not."""
        if not self._distinct:
            return ""
        operator = link.address.operator
        for number, other in enumerate(self.links):
            if number not in self._gone and other is not link and other.address.operator == operator:
                return f"{other.address} is of {operator!r}, too: say whose they are, host:port@operator"
        return link.unbound

    def _enough(self, numbers: Sequence[int]) -> bool:
        """Whether the workers with these numbers are of as many operators as the schemes in use need."""
        return len({self.links[number].address.operator for number in numbers}) >= self._least

    def _wait_for_enough(self, error: WorkerError, recall: Recall | None) -> None:
        left = "no worker is left" if not self.present else f"{len(self.present)} left, {self._least} operators needed"
        if recall is not None and recall.sought:
            log.error("%s; %s: waiting up to %g s for one to come back", str(error), left, self._patience)
            while not self._enough(self.present) and (back := recall.returned(self._patience)):
                self._welcome(*back)
            if self._enough(self.present):
                return
        log.error("%s; %s", str(error), left)
        raise error

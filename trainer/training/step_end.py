"""StepEnd: the end of each step of a loop that the program or a framework has: the ranks agree, and count the step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from trainer.ranks.exchange import Exchange
from trainer.training.participant import Participant
from trainer.training.report import record_first_step
from trainer.training.session import Session


class Counter(Protocol):
    """Contents that count steps."""

    done: int
    """Steps done in the whole run."""


class StepEnd:
    """Ends one step after the other. Every rank calls the same methods in one order."""

    def __init__(
        self, run: Participant, contents: Counter, session: Session, message: Callable[[], list[int]] | None = None
    ) -> None:
        """Begin before the first step.

        Args:
            run: The attempt.
            contents: Where steps are counted.
            session: Learns what the ranks agree on, and what steps cost.
            message: Makes this rank's row, which begins with the session's message; None: of nothing else.
        """
        self._run, self._contents, self._session = run, contents, session
        self._message = message or session.message
        self._exchange: Exchange | None = None
        self._started = self._restored_at = time.monotonic()
        self.is_first = True
        """No step has ended in this attempt."""

    def begin_step(self) -> None:
        """Take the time at which a step begins; the next one begins where this one ends."""
        self._started = time.monotonic()

    def start_to_agree(self) -> None:
        """Send this rank's row, before the step is over; once for each step."""
        if self._exchange is None:
            self._exchange = self._run.group.exchange(self._message())

    def agree(self) -> list[list[int]]:
        """Return the rows of all ranks; a collective, unless `start_to_agree` was called."""
        exchange, self._exchange = self._exchange or self._run.group.exchange(self._message()), None
        return exchange.wait()

    def count(self, done: int, ended: float) -> float:
        """Count a step; returns its seconds.

        Args:
            done: Steps done in the whole run now.
            ended: When it ended, in monotonic seconds.
        """
        seconds, self._started = ended - self._started, ended
        self._contents.done = self._run.steps_done = done
        self._run.committed_step = self._session.saver.committed_step
        return seconds

    def end(self, done: int) -> tuple[list[list[int]], float]:
        """End a step: agree, count it, and take in what it cost; returns the ranks' rows, and its seconds.

        Args:
            done: Steps done in the whole run now.
        """
        run, session, begun, ended = self._run, self._session, self._started, time.monotonic()
        is_saving = not session.saver.idle
        rows = self.agree()
        seconds = self.count(done, ended)
        session.take_in(rows, begun)
        if run.journal:
            session.take_in_costs(seconds, is_saving)
        if self.is_first:
            self.is_first = False
            record_first_step(run, self._restored_at)
        return rows, seconds

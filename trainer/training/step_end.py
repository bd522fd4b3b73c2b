"""StepEnd: the end of each step of a loop that the program or a framework has: the ranks agree, and count the step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from trainer.ranks.agreement import Stop
from trainer.ranks.exchange import Exchange
from trainer.training.participant import Participant
from trainer.training.report import record_first_step
from trainer.training.session import Session
from trainer.training.waits import Waits


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
        self._started = self._round_started = self._restored_at = time.monotonic()
        self._rounds = 0
        """Micro-steps of the step under way after which the ranks have agreed."""
        self.is_first = True
        """No step has ended in this attempt."""
        self.data_s: float | None = None
        """Seconds of the step under way that this rank has waited for its batches; None: not measured."""
        self._held_s = 0.0
        """The saver's `held_s` when the step under way began."""
        self.timing: dict[str, float] = {}
        """Of the step that was counted last, for its line of metrics: when it ended, and its waits."""
        self.looks = True
        """All ranks look for a stop after each micro-step of the step under way."""

    def begin_step(self) -> None:
        """Take the time at which a step begins; the next one begins where this one ends."""
        self._started = self._round_started = time.monotonic()
        self._rounds, self._held_s = 0, self._session.saver.held_s

    def start_to_agree(self) -> None:
        """Send this rank's row, before the step is over; once for each step."""
        if self._exchange is None:
            self._exchange = self._run.group.exchange(self._message())

    def choose(self, micro_steps: int) -> bool:
        """Choose whether a stop may end the next step before its end; the same on every rank.

        Args:
            micro_steps: Those of the step.
        """
        self.looks = micro_steps > 1 and self._session.consensus.is_long(micro_steps)
        return self.looks

    def begin_micro_step(self, left: int) -> None:
        """Begin to agree with the other ranks, if a stop may end this step before its end.

        Args:
            left: Micro-steps of the step that follow this one.
        """
        if left and self.looks:
            self.start_to_agree()

    def end_micro_step(self, left: int, is_kept: Callable[[], bool]) -> Stop | None:
        """End a micro-step that does not end its step; returns the stop for which its step is to be dropped.

        Args:
            left: Micro-steps of the step that follow this one.
            is_kept: Returns whether this rank can save the last boundary still.
        """
        run, session = self._run, self._session
        if self._exchange is None:
            return None
        session.take_in(self.agree(), self._round_started)
        self._round_started, self._rounds = time.monotonic(), self._rounds + 1
        if session.stop is None or session.leaves_time(left):
            return None
        is_committed = (session.saver.committed_step or 0) == self._contents.done
        if run.group.all_ranks(is_committed or is_kept()):
            return session.stop
        self.looks = False
        run.print_line("The micro-steps have changed what is saved, so the run stops at the end of the step")
        return None

    def forget(self) -> None:
        """Let go of the rows of a micro-step that does not end."""
        self._exchange = None

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
        seconds = ended - self._started
        self._started = self._round_started = ended
        self._rounds, held_s = 0, self._session.saver.held_s
        waits = Waits(held_s - self._held_s, self.data_s)
        self.timing = {"monotonic": round(ended, 4), **waits.fields()}
        self._held_s, self.data_s = held_s, None if self.data_s is None else 0.0
        self._contents.done = self._run.steps_done = done
        self._run.committed_step = self._session.saver.committed_step
        return seconds

    def end(self, done: int, micro_steps: int = 1) -> tuple[list[list[int]], float]:
        """End a step: agree, count it, and take in what it cost; returns the ranks' rows, and its seconds.

        Args:
            done: Steps done in the whole run now.
            micro_steps: Those of the step.
        """
        run, session, begun, ended = self._run, self._session, self._round_started, time.monotonic()
        left = max(1, micro_steps - self._rounds)
        is_saving = not session.saver.idle
        rows = self.agree()
        seconds = self.count(done, ended)
        session.take_in(rows, begun, left)
        if run.journal:
            session.take_in_costs(seconds, is_saving)
        if self.is_first:
            self.is_first = False
            record_first_step(run, self._restored_at)
        return rows, seconds

"""Consensus: the conclusions that all ranks draw from the messages that they exchange: when to stop, when to save."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from trainer.checkpoint.interval import Interval
from trainer.checkpoint.saving import Saver
from trainer.ranks.agreement import KINDS, MESSAGE_INTS, Message, Stop
from trainer.training.fit import Fit
from trainer.training.host import Host

LONG_S = 1.0
"""A shorter step is always finished at a stop."""


class Consensus:
    """The conclusions from the last round; the same on every rank."""

    def __init__(self, host: Host, saver: Saver, interval: Interval) -> None:
        self._host, self._saver, self._interval = host, saver, interval
        self.stop: Stop | None = None
        self.enough = False
        """The program has ended training early, on some rank."""
        self.save_now = False
        """Some machine may be taken soon: the next boundary is saved."""
        self.save_every = 0
        """Steps between checkpoints; rank 0 sends the number to all ranks."""
        self._of_rank0 = Message()
        self._left_s = 0.0
        """Seconds from the beginning of the last round to the deadline of the agreed stop; the same on all ranks."""
        self._sent_at = time.monotonic()
        """When this rank made its last message."""
        self._round_s = 0.0
        """Seconds that a micro-step takes, as a moving average."""

    def message(self, enough: bool = False) -> list[int]:
        """Return this rank's message, with which its row of an exchange begins.

        Args:
            enough: Whether the program has ended training early on this rank.
        """
        now = self._sent_at = time.monotonic()
        own = self._host.own_stop()
        deadline = min(stop.deadline for stop in (own, self.stop) if stop) if own or self.stop else now
        return Message(
            stop=KINDS.index(own.kind) if own else 0,
            left_ms=max(0, round((deadline - now) * 1000)),
            age_ms=max(0, round((now - own.heard_at) * 1000)) if own else 0,
            round_ms=math.ceil(self._round_s * 1000),
            save_ms=math.ceil(self._saver.save_s * 1000),
            save_every=self._interval.steps if self._host.group.rank == 0 else 0,
            enough=int(enough),
            save_now=int(self._host.hinted.is_set()),
        ).to_ints()

    def take_in(self, rows: Sequence[Sequence[int]], round_started: float | None = None, micro_steps: int = 1) -> None:
        """Draw the conclusions from the rows of all ranks.

        Args:
            rows: By rank; each begins with a message.
            round_started: When the round began, in monotonic seconds. None for a round outside of a step, whose time
                is not counted.
            micro_steps: The number of micro-steps that were done in the round.
        """
        messages = [Message(*row[:MESSAGE_INTS]) for row in rows]
        self._of_rank0 = messages[0]
        self.save_every = messages[0].save_every
        self.enough = any(message.enough for message in messages)
        self.save_now = any(message.save_now for message in messages)
        if round_started is not None:
            seconds = (time.monotonic() - round_started) / micro_steps
            self._round_s = seconds if not self._round_s else 0.8 * self._round_s + 0.2 * seconds
        stopping = [message for message in messages if message.stop or self.stop]
        first = min(stopping, key=lambda message: message.left_ms, default=Message())
        self._left_s = first.left_ms / 1000
        if stopping and not self.stop:
            heard_at = self._sent_at - first.age_ms / 1000
            self.stop = Stop(KINDS[first.stop], self._sent_at + self._left_s, heard_at)
            self._host.stopping = self.stop.ending
            self._saver.hurry(self.stop.deadline)

    def is_long(self, micro_steps: int) -> bool:
        """True if a step takes so long that a stop should not wait for its end; the same on every rank.

        Args:
            micro_steps: Those of the step.
        """
        round_ms = self._of_rank0.round_ms
        return not round_ms or micro_steps * round_ms >= 1000 * LONG_S

    def fit(self, rounds_left: int) -> Fit:
        """Return what fits before the deadline of the agreed stop; the same on every rank.

        Args:
            rounds_left: Micro-steps until the end of the step.
        """
        round_s = self._of_rank0.round_ms / 1000
        # The rows were sent when the micro-step began that has just ended.
        left_s = max(0.0, self._left_s - round_s)
        return Fit(left_s, rounds_left, round_s, self._of_rank0.save_ms / 1000)

"""Consensus: the conclusions that all ranks draw from the rows that they exchange at each micro-step.

They are the stop and its deadline, the weights of the next step's micro-steps, and the number of steps between saves.
"""

from __future__ import annotations

import math
import time

import torch

from trainer.bucket.hashing import fingerprint
from trainer.ranks.agreement import KINDS, Row, Stop
from trainer.ranks.exchange import Exchange
from trainer.training.checkpointer import Checkpointer
from trainer.training.participant import Participant
from trainer.training.samples import MicroStep

REQUESTED_STOP_S = 120.0
"""The time that a requested stop may take."""


class Consensus:
    """The conclusions from the last round; the same on every rank."""

    def __init__(self, run: Participant, checkpointer: Checkpointer) -> None:
        self._run, self._checkpointer = run, checkpointer
        self.stop: Stop | None = None
        self.weights: list[float] = []
        """The weights of the next step's micro-steps, of all ranks."""
        self.save_every = 0
        """Steps between checkpoints; rank 0 sends the number to all ranks."""
        self._left_s = 0.0
        """Seconds from the last round to the deadline of the agreed stop; the same on all ranks."""
        self._round_s = 0.0
        """Seconds that a round takes, as a moving average."""

    def start_round(self, micro: MicroStep | None = None, weights: tuple[float, ...] = ()) -> Exchange:
        """Start to send this rank's row to all ranks; during a micro-step, its generators must be seeded already."""
        return self._run.group.exchange(self._row(micro, weights).to_ints())

    def _row(self, micro: MicroStep | None, weights: tuple[float, ...]) -> Row:
        now = time.monotonic()
        save_s = self._checkpointer.saver.commit_s or 0.0
        counted = micro is not None and micro.weight > 0
        kind, left_s = self._own_stop(now)
        if self.stop:
            left_s = min(left_s, self.stop.deadline - now)
        return Row(
            stop=KINDS.index(kind),
            left_ms=max(0, round(left_s * 1000)) if math.isfinite(left_s) else 0,
            order=fingerprint(micro.index, micro.ids.tobytes()) if counted and micro else 0,
            rng=fingerprint(micro.index, torch.initial_seed()) if counted and micro else 0,
            round_ms=round(self._round_s * 1000),
            save_ms=math.ceil(save_s * 1000),
            save_every=self._checkpointer.interval.steps if self._run.rank == 0 else 0,
            weights=weights,
        )

    def _own_stop(self, now: float) -> tuple[str, float]:
        """This rank's reason to stop ("": none), and the seconds until its deadline (infinite without a reason)."""
        notice, journal = self._run.notices.first(), self._run.journal
        found = journal.stop_reason if journal else None
        if found and not found.ending.saves:
            return found.ending.cause, 0.0  # No other deadline is earlier, and rank 0's row is the first.
        if notice:
            return notice.kind, notice.deadline - now
        return (found.ending.cause, REQUESTED_STOP_S) if found else ("", math.inf)

    def take_in(self, received: list[list[int]], round_started: float | None) -> None:
        """Draw the conclusions from the rows of all ranks.

        Args:
            received: The rows, by rank.
            round_started: When the round began, in monotonic seconds. None for a round outside of a step, whose time
                is not counted.
        """
        rows = [Row.from_ints(row) for row in received]
        self.weights = [weight for row in rows for weight in row.weights]
        self.save_every = rows[0].save_every
        if round_started is not None:
            seconds = time.monotonic() - round_started
            self._round_s = seconds if not self._round_s else 0.8 * self._round_s + 0.2 * seconds
        stopping = [row for row in rows if row.stop or self.stop]
        first = min(stopping, key=lambda row: row.left_ms, default=Row())
        self._left_s = first.left_ms / 1000
        if self.stop:
            return
        if stopping:
            self.stop = Stop(KINDS[first.stop], time.monotonic() + self._left_s)
            self._run.stopping = self.stop.ending
            self._checkpointer.saver.hurry(self.stop.deadline)

    def leaves_time(self, rounds_left: int, rank0: Row) -> bool:
        """True if the rest of a step and a save fit before the deadline; the same answer on every rank."""
        assert self.stop
        if not self.stop.ending.saves:
            return False
        return rounds_left * rank0.round_ms + 1.5 * rank0.save_ms < 1000 * self._left_s

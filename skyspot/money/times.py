"""Where the time of an attempt went: its steps, its saves, its set-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from skyspot.money.attempts import Life
from skyspot.money.clock import Clock, clock_of
from skyspot.runs.records import AttemptRecords, Line, whole
from trainer.layout.events import number


@dataclass(frozen=True)
class Times:
    """Seconds by what they went into. No second is in two of them."""

    productive: float = 0.0
    """Steps that are preserved, without what they waited for saves and samples."""
    lost: float = 0.0
    """Steps that were done again, or will be."""
    setup: float = 0.0
    """From the start of the set-up to the first step, without the restore."""
    restore: float = 0.0
    saving: float = 0.0
    """Training waited for a save; and the last save of an attempt."""
    evaluation: float = 0.0
    data: float = 0.0
    """Training waited for samples."""
    waiting: float = 0.0
    """There was no machine."""
    other: float = 0.0
    """The rest: a step that was cut off, the export, leaving."""

    @property
    def total(self) -> float:
        """All seconds."""
        return math.fsum(getattr(self, item.name) for item in fields(self))


def added(times: Sequence[Times]) -> Times:
    """The sums of several."""
    return Times(**{item.name: math.fsum(getattr(one, item.name) for one in times) for item in fields(Times)})


def times_of(records: AttemptRecords, life: Life, kept_until: float, waiting_s: float) -> Times:
    """Where an attempt's time went.

    Args:
        records: Its records.
        life: Its account.
        kept_until: Its steps up to this one are preserved.
        waiting_s: Seconds without a machine before it.
    """
    clock = clock_of(records)
    steps = [line for line in records.lines if line.is_step and line.step_s is not None]
    kept = [line for line in steps if line.step <= kept_until]
    left = life.seconds
    # What is known goes first; each part takes no more than is left, however odd a record is.
    dropped = [line for line in records.lines if line.step > kept_until]
    lost, left = _take(left, sum((line.step_s or 0.0) if line.is_step else line.eval_s for line in dropped))
    more, left = _take(left, _unrecorded_lost_s(steps, life, kept_until))
    data, left = _take(left, sum(_within(line.data_s, line) for line in kept))
    in_steps, left = _take(left, sum(_within(line.save_s, line) for line in kept))
    evaluation, left = _take(left, sum(line.eval_s for line in records.lines if line.step <= kept_until))
    waits = sum(_within((line.data_s or 0.0) + line.save_s + line.eval_s, line) for line in kept)
    productive, left = _take(left, sum(line.step_s or 0.0 for line in kept) - waits)
    restore, left = _take(left, life.restore_s)
    setup, left = _take(left, _before_training_s(records, steps, clock, life) - restore)
    between, left = _take(left, _between_steps_s(records, kept, clock))
    last, left = _take(left, _last_save_s(records, steps, clock))
    return Times(
        productive=productive, lost=lost + more, setup=setup, restore=restore, saving=in_steps + between + last,
        evaluation=evaluation, data=data, waiting=waiting_s, other=left,
    )  # fmt: skip


def _take(left: float, wanted: float) -> tuple[float, float]:
    taken = min(max(0.0, wanted), left)
    return taken, left - taken


def _within(seconds: float | None, line: Line) -> float:
    return min(seconds or 0.0, line.step_s or 0.0)


def _unrecorded_lost_s(steps: Sequence[Line], life: Life, kept_until: float) -> float:
    """The time of lost steps without a line of metrics, at the mean of the steps that have one."""
    if life.last_step is None or not steps:
        return 0.0
    first = max(steps[-1].step, life.restored_step or 0, min(kept_until, life.last_step))
    return max(0.0, life.last_step - first) * (sum(line.step_s or 0.0 for line in steps) / len(steps))


def _before_training_s(records: AttemptRecords, steps: Sequence[Line], clock: Clock, life: Life) -> float:
    """Seconds from the start of the set-up to the start of the first step; of an attempt without a step, all."""
    if not steps:
        return life.seconds
    ended = clock.ended(steps[0])
    if ended is None:
        ended = clock.at(records.event("first-step"))
    return 0.0 if ended is None else life.lead_s + ended - (steps[0].step_s or 0.0)


def _between_steps_s(records: AttemptRecords, kept: Sequence[Line], clock: Clock) -> float:
    """Seconds between two steps in which a save began; from releases without the steps' times, what saves report."""
    saved = {step: event for event in records.events_named("saved") if (step := whole(event, "step")) is not None}
    if any(clock.ended(line) is None for line in kept):
        return sum(number(saved[line.step], "stall_s") or 0.0 for line in kept if line.step in saved)
    evaluated = {line.step: line.eval_s for line in records.lines if not line.is_step}
    found = 0.0
    for before, after in pairwise(kept):
        if before.step in saved:
            gap = (clock.ended(after) or 0.0) - (after.step_s or 0.0) - (clock.ended(before) or 0.0)
            found += max(0.0, gap - evaluated.get(before.step, 0.0))
    return found


def _last_save_s(records: AttemptRecords, steps: Sequence[Line], clock: Clock) -> float:
    """Seconds of the save that an attempt waited for before it ended; 0 for one without an end event."""
    if not records.event("end") or not steps:
        return 0.0
    stop = records.event("save-begin")
    begun = clock.at(stop) if stop else clock.ended(records.lines[-1])  # The line may be an evaluation's.
    saved = clock.at(records.event("saved")) if records.event("saved") else None
    return max(0.0, saved - begun) if begun is not None and saved is not None else 0.0

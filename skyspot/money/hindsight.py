"""The interval between saves that a run has used, against the best one in hindsight.

A save every T seconds costs C / T of the time, and a preemption every M seconds costs half an interval: T / 2 / M. The
sum is least at T = sqrt(2 * C * M) (J. W. Young, 1974). As the trainer's choice (trainer/checkpoint/interval.py), the
best interval is at least a step, and twice as long as a save takes to be committed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from skyspot.money.expected import best_interval_s
from skyspot.runs.records import AttemptRecords, whole
from trainer.layout.events import number

TOO_FEW = 2
"""With fewer preemptions, their mean distance tells nothing."""
IDLE_SHARE = 2.0


@dataclass(frozen=True)
class Interval:
    """An interval between saves and the best one. None: not known."""

    chosen_steps: int | None
    step_s: float | None
    """Mean seconds of a step."""
    save_cost_s: float | None
    """Seconds of training that a save costs."""
    commit_s: float | None
    """Seconds from a boundary to its commit."""
    between_s: float | None
    """Mean time between preemptions; None with fewer than two."""
    best_steps: int | None
    chosen_loss: float | None
    """The expected share of the time that saves and preemptions cost, from 0."""
    best_loss: float | None
    why_unknown: str
    """Why there is no best interval; empty if there is one."""


def interval_of(records: Sequence[AttemptRecords], lived_s: float, preemptions: int) -> Interval:
    """The interval of a run against the best one.

    Args:
        records: Of its attempts.
        lived_s: Seconds that they lived, together.
        preemptions: Those of them that ended by one.
    """
    saved = [event for one in records for event in one.events_named("saved")]
    times = [line.step_s for one in records for line in one.lines if line.is_step and line.step_s]
    step_s = statistics.fmean(times) if times else None
    chosen = _chosen(records)
    measured = [cost for one in records for event in one.events_named("interval") if (cost := number(event, "cost_s"))]
    stalls = [stall for event in saved if (stall := number(event, "stall_s")) is not None]
    cost_s = measured[-1] if measured else statistics.fmean(stalls) if stalls else None
    commits = [commit for event in saved if (commit := number(event, "commit_s")) is not None]
    commit_s = statistics.median(commits) if commits else None
    between_s = lived_s / preemptions if preemptions >= TOO_FEW else None
    why = ""
    if not step_s or cost_s is None:
        why = "no save is recorded" if step_s else "no step is recorded"
    elif between_s is None:
        why = "too few preemptions to tell"
    best = chosen_loss = best_loss = None
    if step_s and cost_s is not None and between_s:
        best_s = max(best_interval_s(cost_s, between_s), IDLE_SHARE * (commit_s or 0.0), step_s)
        best = max(1, round(best_s / step_s))
        best_loss = _loss(best * step_s, cost_s, between_s)
        chosen_loss = _loss(chosen * step_s, cost_s, between_s) if chosen else None
    return Interval(chosen, step_s, cost_s, commit_s, between_s, best, chosen_loss, best_loss, why)


def _loss(interval_s: float, cost_s: float, between_s: float) -> float:
    return cost_s / interval_s + interval_s / 2 / between_s


def _chosen(records: Sequence[AttemptRecords]) -> int | None:
    """The steps between saves: what `auto` chose last, or else the median of those that were committed."""
    auto = [steps for one in records for event in one.events_named("interval") if (steps := whole(event, "steps"))]
    if auto:
        return auto[-1]
    gaps: list[int] = []
    for one in records:
        boundaries = [step for event in one.events_named("saved") if (step := whole(event, "step"))]
        gaps += [after - before for before, after in pairwise(boundaries) if after > before]
    return round(statistics.median(gaps)) if gaps else None

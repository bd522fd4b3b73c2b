"""Interval: the steps between saves by Young and Daly, from the cost of this run's saves and its preemptions.

Saving every T seconds costs C/T of the time. A preemption, every M seconds on average, costs half an interval. The sum
is least at T = sqrt(2 * C * M) (Young 1974, Daly 2006). C is the cost of a save to training, not its time to upload.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trainer.layout.clouds import cloud_named, notice_s
from trainer.layout.events import event_named, read_events, read_progress
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.layout.names import AttemptName, RunPaths, list_attempts

PRIOR_S = 7200.0
"""The assumed mean time between preemptions; as a prior it weighs as much as one preemption."""
FIRST_S = 60.0
"""A run's first save comes after so many seconds or steps; it shows what a save costs."""
FIRST_STEPS = 20
IDLE_SHARE = 2.0
"""An interval lasts at least so many times as long as a save."""
REPORT_FACTOR = 1.25
"""A new choice is reported if it differs by this factor."""
_WINDOW = 50
_YEAR_5000 = 1e11


@dataclass(frozen=True)
class Costs:
    """The measured costs of a run's saves."""

    step_s: float
    """Seconds of a step with no save beside it."""
    cost_s: float
    """Seconds of training that a save costs: the wait for it, and the slower steps beside it."""
    commit_s: float
    """Seconds from the boundary to the commit."""


@dataclass(frozen=True)
class Lives:
    """The total lifetime of a run's attempts, and their preemptions."""

    seconds: float
    preemptions: int

    @property
    def between_s(self) -> float:
        """Mean time between preemptions, in seconds, with the prior."""
        return (PRIOR_S + self.seconds) / (1 + self.preemptions)


@dataclass(frozen=True)
class Choice:
    """The chosen interval."""

    steps: int
    why: str


class Pace:
    """Measures the cost of saves to training, from the duration of each step."""

    def __init__(self) -> None:
        self._undisturbed: deque[float] = deque(maxlen=_WINDOW)
        self._beside: list[float] = []

    def step(self, seconds: float, beside_a_save: bool) -> None:
        """Count a step."""
        if beside_a_save:
            self._beside.append(seconds)
        else:
            self._undisturbed.append(seconds)

    @property
    def step_s(self) -> float:
        """Seconds of a step with no save beside it; 0 while none is known."""
        known = self._undisturbed or self._beside
        return statistics.median(known) if known else 0.0

    def saved(self, begun_s: float, stall_s: float, commit_s: float) -> Costs:
        """The cost of a save that is decided.

        Args:
            begun_s: Seconds that training stood still at the boundary.
            stall_s: `begun_s` and the wait before the optimizer's step, which is a part of that step's time.
            commit_s: Seconds from the boundary to the commit.
        """
        slower = sum(seconds - self.step_s for seconds in self._beside)
        self._beside = []
        return Costs(self.step_s, max(stall_s, begun_s + slower, 1e-3), commit_s)


class Interval:
    """The number of steps between checkpoints: as configured, or chosen anew after each save. Rank 0's counts."""

    def __init__(self, given: int | None, notice_s: float, report: Callable[[Choice, Costs], None]) -> None:
        """Begin with nothing known.

        Args:
            given: Steps; None to choose them.
            notice_s: Seconds from a notice to the end of the machine.
            report: Called with a choice that differs enough from the previous one, and the costs behind it.
        """
        self._given, self._notice_s, self._report = given, notice_s, report
        self._pace, self._lives, self._began = Pace(), Lives(0.0, 0), time.monotonic()
        self._choice: Choice | None = None
        self._looked_at = 0
        """The step of the save after which the interval was last chosen."""

    @property
    def steps(self) -> int:
        """The number of steps between checkpoints from now on."""
        if self._given is not None:
            return self._given
        return self._choice.steps if self._choice else first_steps(self._pace.step_s)

    def learn(self, paths: RunPaths, name: AttemptName, step: int) -> None:
        """Read the records of earlier attempts; this one resumed from `step`. Unreadable records are ignored."""
        self._looked_at = step
        if self._given is None:
            with suppress(OSError):
                self._lives, costs = earlier(paths, name)
                if costs:
                    self._choose(costs)

    def stepped(self, seconds: float, beside_a_save: bool) -> None:
        """Count a step."""
        if self._given is None:
            self._pace.step(seconds, beside_a_save)

    def saved(self, step: int, begun_s: float, stall_s: float, commit_s: float) -> None:
        """Take in the save of a step, with arguments as of `Pace.saved`; the same save again changes nothing."""
        if self._given is None and step > self._looked_at:
            self._looked_at = step
            self._choose(self._pace.saved(begun_s, stall_s, commit_s))

    def _choose(self, costs: Costs) -> None:
        lived = Lives(self._lives.seconds + time.monotonic() - self._began, self._lives.preemptions)
        before, self._choice = self._choice, choose(costs, lived, self._notice_s)
        if not before or not 1 / REPORT_FACTOR < self._choice.steps / before.steps < REPORT_FACTOR:
            self._report(self._choice, costs)


def choose(costs: Costs, lives: Lives, notice_s: float) -> Choice:
    """The interval that loses least time, but at least IDLE_SHARE times the duration of a save.

    That bound leaves room after a notice: the save under way then ends soon enough for the last one.

    Args:
        costs: Of saves and steps.
        lives: Of the attempts.
        notice_s: Seconds from a notice to the end of the machine.
    """
    best_s = math.sqrt(2 * costs.cost_s * lives.between_s)
    least_s = IDLE_SHARE * costs.commit_s
    seconds = max(best_s, least_s, costs.step_s)
    steps = max(1, round(seconds / max(costs.step_s, 1e-6)))
    why = (
        f"a save costs {costs.cost_s:.2g} s of training and takes {costs.commit_s:.2g} s; "
        f"a step takes {costs.step_s:.2g} s; assuming a preemption every {_duration(lives.between_s)} "
        f"({lives.preemptions} seen in {_duration(lives.seconds)}; prior: one per {_duration(PRIOR_S)})"
    )
    if best_s < least_s:
        why += f"; raised to {IDLE_SHARE:g} times the duration of a save, so that a final save fits after a notice"
    if IDLE_SHARE * costs.commit_s > notice_s:
        why += f"; a notice of {notice_s:g} s may be too short for two saves in a row"
    return Choice(min(steps, 10**9), why)


def first_steps(step_s: float) -> int:
    """The interval while the cost of a save is unknown."""
    return max(1, min(FIRST_STEPS, int(FIRST_S / step_s))) if step_s else FIRST_STEPS


def notice_seconds(grace_s: float) -> float:
    """Seconds of notice that this machine's cloud gives; `grace_s` if it is not known."""
    seconds = notice_s(cloud_named())
    return grace_s if seconds is None else seconds


def earlier(paths: RunPaths, name: AttemptName) -> tuple[Lives, Costs | None]:
    """The lifetimes of the attempts before this one, and the costs of saves that they measured last.

    An attempt's life lasts from its start to its last record, both by its own machine's clock.

    Raises:
        OSError: the bucket cannot be read.
    """
    seconds, preemptions, costs = 0.0, 0, None
    for other in list_attempts(paths):
        if other >= name:
            continue
        events = read_events(paths, other, ("start", "restored", "interval", "end"))
        begun = (event_named(events, "start") or {}).get("time")
        recorded = [event.fields.get("time") for event in events] + [read_progress(paths, other).get("time")]
        times = [time for time in recorded if isinstance(time, (int, float)) and 0 <= time < _YEAR_5000]
        if begun not in times:
            continue
        seconds += min(max(0.0, max(times) - begun), 1e8)
        end = event_named(events, "end")
        preemptions += end is None or end.get("code") == EXIT_PREEMPTED
        costs = _costs(event_named(events, "interval")) or costs
    return Lives(seconds, preemptions), costs


def _costs(event: Mapping[str, Any] | None) -> Costs | None:
    numbers = [(event or {}).get(key) for key in ("step_s", "cost_s", "commit_s")]
    if all(isinstance(number, (int, float)) and 0 <= number < 1e6 for number in numbers):
        return Costs(*map(float, numbers))  # type: ignore[arg-type]
    return None


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"

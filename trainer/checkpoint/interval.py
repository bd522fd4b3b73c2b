"""How often to save: Young's and Daly's interval, from what saves cost this run and how often it was preempted.

Saving every T seconds costs C/T of the time; a preemption, every M seconds on average, costs half an interval: together
least at T = sqrt(2 * C * M) (Young 1974, Daly 2006). C is what a save costs training, not what it takes to upload.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trainer.layout.events import event_named, read_events, read_progress
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.layout.names import AttemptName, RunPaths, list_attempts

PRIOR_S = 7200.0
"""Mean time between preemptions before any is seen; it weighs as much as one preemption."""
FIRST_S = 60.0
"""After so long, or so many steps, the first save of a run shows what one costs."""
FIRST_STEPS = 20
IDLE_SHARE = 2.0
"""An interval is at least so many times as long as a save takes."""
NOTICE_S = {"aws": 120.0, "gcp": 30.0, "azure": 30.0, "runpod": 5.0}
"""What the clouds give between the word and the end."""
SAY_FACTOR = 1.25
"""A new choice is said where it differs by so much."""
_WINDOW = 50
_YEAR_5000 = 1e11


@dataclass(frozen=True)
class Costs:
    """What is known of a run's saves."""

    step_s: float
    """A step beside which nothing is saved."""
    cost_s: float
    """Seconds of training that a save costs: waiting for it, and the steps that are slower beside it."""
    commit_s: float
    """From the boundary to the commit."""


@dataclass(frozen=True)
class Lives:
    """How long a run's attempts have lived."""

    seconds: float
    preemptions: int

    @property
    def between_s(self) -> float:
        """Mean time between preemptions, in seconds, with the prior."""
        return (PRIOR_S + self.seconds) / (1 + self.preemptions)


@dataclass(frozen=True)
class Choice:
    """How often to save."""

    steps: int
    why: str


class Pace:
    """Measures what saves cost training. A clock of its own is not needed: it is told how long each step took."""

    def __init__(self) -> None:
        self._undisturbed: deque[float] = deque(maxlen=_WINDOW)
        self._beside: list[float] = []

    def step(self, seconds: float, beside_a_save: bool) -> None:
        """A step was done."""
        if beside_a_save:
            self._beside.append(seconds)
        else:
            self._undisturbed.append(seconds)

    @property
    def step_s(self) -> float:
        """Seconds of a step beside which nothing is saved; 0 while none is known."""
        known = self._undisturbed or self._beside
        return statistics.median(known) if known else 0.0

    def saved(self, begun_s: float, stall_s: float, commit_s: float) -> Costs:
        """A save is decided: what it cost.

        Args:
            begun_s: Seconds that training stood still at the boundary.
            stall_s: Those, and the wait before the optimizer's step, which is a part of that step's time.
            commit_s: From the boundary to the commit.
        """
        slower = sum(seconds - self.step_s for seconds in self._beside)
        self._beside = []
        return Costs(self.step_s, max(stall_s, begun_s + slower, 1e-3), commit_s)


class Interval:
    """Rank 0's word on how many steps to leave between checkpoints: as given, or chosen anew after each save."""

    def __init__(self, given: int | None, notice_s: float, tell: Callable[[Choice, Costs], None]) -> None:
        """Begin with nothing known.

        Args:
            given: Steps; None where they are to be chosen.
            notice_s: Seconds from the word to the end of the machine.
            tell: Called with a choice that is worth a word, and what it was made from.
        """
        self._given, self._notice_s, self._tell = given, notice_s, tell
        self._pace, self._lives, self._began = Pace(), Lives(0.0, 0), time.monotonic()
        self._choice: Choice | None = None
        self._looked_at = 0
        """The save that was last chosen after, as the step it is of."""

    @property
    def steps(self) -> int:
        """To leave between checkpoints from now on."""
        if self._given is not None:
            return self._given
        return self._choice.steps if self._choice else first_steps(self._pace.step_s)

    def learn(self, paths: RunPaths, name: AttemptName, step: int) -> None:
        """Take in what the attempts before this one tell, which goes on from `step`; unreadable, they tell nothing."""
        self._looked_at = step
        if self._given is None:
            with suppress(OSError):
                self._lives, costs = earlier(paths, name)
                if costs:
                    self._choose(costs)

    def stepped(self, seconds: float, beside_a_save: bool) -> None:
        """A step was done."""
        if self._given is None:
            self._pace.step(seconds, beside_a_save)

    def saved(self, step: int, begun_s: float, stall_s: float, commit_s: float) -> None:
        """The save of a step is over, at a cost as of `Pace.saved`; to say so again changes nothing."""
        if self._given is None and step > self._looked_at:
            self._looked_at = step
            self._choose(self._pace.saved(begun_s, stall_s, commit_s))

    def _choose(self, costs: Costs) -> None:
        lived = Lives(self._lives.seconds + time.monotonic() - self._began, self._lives.preemptions)
        before, self._choice = self._choice, choose(costs, lived, self._notice_s)
        if not before or not 1 / SAY_FACTOR < self._choice.steps / before.steps < SAY_FACTOR:
            self._tell(self._choice, costs)


def choose(costs: Costs, lives: Lives, notice_s: float) -> Choice:
    """The interval that loses least, at least IDLE_SHARE times what a save takes.

    That bound leaves a notice room: the save that is under way when it comes is over soon enough for the last one.

    Args:
        costs: Of saves and steps.
        lives: Of attempts.
        notice_s: Seconds from the word to the end of the machine.
    """
    best_s = math.sqrt(2 * costs.cost_s * lives.between_s)
    least_s = IDLE_SHARE * costs.commit_s
    seconds = max(best_s, least_s, costs.step_s)
    steps = max(1, round(seconds / max(costs.step_s, 1e-6)))
    seen = f"{lives.preemptions} preemption{'s' * (lives.preemptions != 1)} in {_duration(lives.seconds)}"
    why = (
        f"a save costs training {costs.cost_s:.2g} s and takes {costs.commit_s:.2g} s, a step {costs.step_s:.2g} s; "
        f"one preemption every {_duration(lives.between_s)} is reckoned with ({seen}, on top of one in "
        f"{_duration(PRIOR_S)} assumed)"
    )
    if best_s < least_s:
        why += f"; at least {IDLE_SHARE:g} times what a save takes, so that a last one has room after a notice"
    if IDLE_SHARE * costs.commit_s > notice_s:
        why += f"; a notice of {notice_s:g} s may be too short for a save behind another one"
    return Choice(min(steps, 10**9), why)


def first_steps(step_s: float) -> int:
    """After how many steps to save where nothing is known of what a save costs."""
    return max(1, min(FIRST_STEPS, int(FIRST_S / step_s))) if step_s else FIRST_STEPS


def notice_seconds(grace_s: float) -> float:
    """What this machine's cloud gives; the grace where it is not known (SKYPILOT_CLUSTER_INFO)."""
    try:
        cloud = str(json.loads(os.environ.get("SKYPILOT_CLUSTER_INFO", "{}")).get("cloud", "")).lower()
    except (ValueError, AttributeError):
        cloud = ""
    return NOTICE_S.get(cloud, grace_s)


def earlier(paths: RunPaths, name: AttemptName) -> tuple[Lives, Costs | None]:
    """What the attempts before this one tell: how long they lived, and what they last found saves to cost.

    An attempt's life is from its start to its last word, both by its own machine's clock.

    Raises:
        OSError: the bucket cannot be read.
    """
    seconds, preemptions, costs = 0.0, 0, None
    for other in list_attempts(paths):
        if other >= name:
            continue
        events = read_events(paths, other, ("start", "restored", "interval", "end"))
        begun = (event_named(events, "start") or {}).get("time")
        words = [event.fields.get("time") for event in events] + [read_progress(paths, other).get("time")]
        times = [word for word in words if isinstance(word, (int, float)) and 0 <= word < _YEAR_5000]
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

"""The expected time of a run that is preempted, by Young and Daly.

A run works for T seconds, saves for C, and so on. It is preempted every M seconds on average, at instants that do not
depend on each other. It then takes R seconds until it trains again, and does the work since the last save once more.
The expected wall time of H seconds of work is

    M * exp(R / M) * (exp((T + C) / M) - 1) * H / T

(J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer
Systems 22, 2006, equation 13). It is least near T = sqrt(2 * C * M) (J. W. Young, A first order approximation to the
optimum checkpoint interval, Communications of the ACM 17, 1974). For T, C and R far below M it is close to
H * (1 + C / T + (T / 2 + R) / M).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BETWEEN_S = 7200.0
"""The assumed mean time between preemptions: the trainer's own (PRIOR_S in trainer/checkpoint/interval.py)."""
RECOVERY_S = 600.0
"""The assumed time from a preemption to the first step after it: a machine, its set-up, the restore."""
SAVE_COST_S = 5.0
"""The seconds of training that a save is assumed to cost."""
NEVER_HOURS = 1e6
"""A run with a longer expected time is said never to end."""


@dataclass(frozen=True)
class Preemptions:
    """What a run is expected to lose. All in seconds."""

    between_s: float = BETWEEN_S
    """Mean time between preemptions."""
    recovery_s: float = RECOVERY_S
    """From a preemption to the first step after it."""
    save_cost_s: float = SAVE_COST_S
    """Of training, for each save."""
    save_interval_s: float | None = None
    """Training between two saves; None: the best one, by Young."""

    @property
    def interval_s(self) -> float:
        """Training between two saves."""
        return best_interval_s(self.save_cost_s, self.between_s) if self.save_interval_s is None else (
            self.save_interval_s)  # fmt: skip

    def factor(self) -> float:
        """The expected wall time of one second of work; infinite if it is beyond all numbers."""
        m, t = self.between_s, self.interval_s
        try:
            return m * math.exp(self.recovery_s / m) * math.expm1((t + self.save_cost_s) / m) / t
        except OverflowError:
            return math.inf


def best_interval_s(save_cost_s: float, between_s: float) -> float:
    """The interval between saves that loses least, in seconds (Young 1974)."""
    return math.sqrt(2 * save_cost_s * between_s)

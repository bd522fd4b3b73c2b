"""Steps whose losses or gradients are not finite (NaN or infinite): detects and counts them, and applies --on-nan.

A step is judged before the optimizer steps, from the losses and gradient norms that all ranks have exchanged, so that
all draw the same conclusion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

STOP, SKIP, IGNORE = "stop", "skip", "ignore"

IN_A_ROW = {STOP: 3, SKIP: 100}
"""The run ends after so many such steps in a row."""

REPORTED = 10
"""An attempt prints the first skipped steps one by one, and then every hundredth."""


class Watch:
    """Counts the steps that were not finite; the same on every rank."""

    def __init__(self, policy: str) -> None:
        """Begin with steps that are all finite; `policy` is STOP, SKIP or IGNORE."""
        self._policy = policy
        self.row = 0
        """Steps in a row, up to the last one, that were not finite."""
        self.skipped = 0
        """Steps of the run whose update was dropped."""
        self._reported = 0

    def state_dict(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"row": self.row, "skipped": self.skipped}

    def load_state_dict(self, saved: object) -> None:
        """Load the counts from a checkpoint; old ones have none."""
        saved = saved if isinstance(saved, Mapping) else {}
        self.row, self.skipped = (
            value if type(value := saved.get(key)) is int and value >= 0 else 0 for key in ("row", "skipped")
        )

    def step(self, trouble: str | None) -> bool:
        """Count a step with its `trouble`, if any; returns whether to drop its update."""
        self.row = self.row + 1 if trouble else 0
        dropped = bool(trouble) and self._policy == SKIP
        self.skipped += dropped
        return dropped

    def should_report(self) -> bool:
        """True if the trouble of the step that was just counted is to be printed."""
        self._reported += 1
        if self._policy == IGNORE:
            return self._reported == 1
        return self._policy == STOP or self._reported <= REPORTED or self._reported % 100 == 0

    @property
    def is_enough(self) -> bool:
        """True if the run has to end."""
        return self.row >= IN_A_ROW.get(self._policy, math.inf)


def trouble(losses: Sequence[float], norms: Sequence[float]) -> str | None:
    """The first loss (in the order of micro-steps) or gradient norm that is not finite, as a phrase; else None."""
    for value in losses:
        if not math.isfinite(value):
            return f"the loss is not finite ({value})"
    for value in norms:
        if not math.isfinite(value):
            return f"the gradients' norm is not finite ({value})"
    return None

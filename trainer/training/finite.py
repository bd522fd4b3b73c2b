"""Steps whose losses or gradients are not finite (NaN or infinite): judged, counted, and what becomes of the run.

A step is judged from its losses and its gradients' norm before the optimizer steps, from what all ranks told each
other, so that all draw the same conclusion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

STOP, SKIP, IGNORE = "stop", "skip", "ignore"

IN_A_ROW = {STOP: 3, SKIP: 100}
"""After so many such steps in a row the run ends."""

SAID = 10
"""Skipped steps that an attempt says one by one; after that it says every hundredth."""


class Watch:
    """What the steps so far have given; the same on every rank."""

    def __init__(self, policy: str) -> None:
        """Begin with steps that are all finite; `policy` is STOP, SKIP or IGNORE."""
        self._policy = policy
        self.row = 0
        """Steps in a row, up to the last one, that were not finite."""
        self.skipped = 0
        """Steps of the run whose update was dropped."""
        self._said = 0

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps of it."""
        return {"row": self.row, "skipped": self.skipped}

    def load_state_dict(self, saved: object) -> None:
        """Take over what a checkpoint kept; older ones kept nothing."""
        saved = saved if isinstance(saved, Mapping) else {}
        self.row, self.skipped = (
            value if type(value := saved.get(key)) is int and value >= 0 else 0 for key in ("row", "skipped")
        )

    def step(self, trouble: str | None) -> bool:
        """Take in a step, and what `trouble` there was; whether its update is to be dropped."""
        self.row = self.row + 1 if trouble else 0
        dropped = bool(trouble) and self._policy == SKIP
        self.skipped += dropped
        return dropped

    def worth_saying(self) -> bool:
        """Whether the trouble of the step just taken in is to be said."""
        self._said += 1
        if self._policy == IGNORE:
            return self._said == 1
        return self._policy == STOP or self._said <= SAID or self._said % 100 == 0

    @property
    def is_enough(self) -> bool:
        """Whether the run ends for it."""
        return self.row >= IN_A_ROW.get(self._policy, math.inf)


def trouble(losses: Sequence[float], norms: Sequence[float]) -> str | None:
    """What is not finite of a step's losses, in the order of micro-steps, and its gradients' norm; None: nothing is."""
    for value in losses:
        if not math.isfinite(value):
            return f"the loss is not finite ({value})"
    for value in norms:
        if not math.isfinite(value):
            return f"the gradients' norm is not finite ({value})"
    return None

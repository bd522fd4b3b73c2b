"""The learning rate as a function of the global step alone, so that no scheduler object has to be restored."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def lr_factor(step: int, *, schedule: str, warmup_steps: int, max_steps: int) -> float:
    """The factor of the peak learning rate for a step.

    Args:
        step: The step about to be done, from 1.
        schedule: One of SCHEDULES.
        warmup_steps: The step at which the factor, which rises linearly, reaches 1.
        max_steps: The last step; cosine and linear end one step short of 0, so that the last step is not wasted.
    """
    if step <= warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    past = (step - warmup_steps - 1) / max(1, max_steps - warmup_steps)
    if schedule == "linear":
        return 1.0 - past
    assert schedule == "cosine", schedule
    return 0.5 * (1.0 + math.cos(math.pi * past))

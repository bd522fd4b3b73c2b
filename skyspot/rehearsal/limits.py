"""How long an attempt may run before a rehearsal stops it.

With `--timeout` no attempt may run longer than that. Without it:

- the undisturbed run may take 30 minutes, or 10 times as long as it took until it first wrote to its bucket, if that is
  longer;
- an attempt of a preempted run may take 30 minutes, or 10 times as long as the undisturbed run took, if that is longer.
"""

from __future__ import annotations

TIMES = 10
LEAST_S = 1800.0


def limit_s(timeout_s: float | None, *, reference_s: float, first_write_s: float) -> float:
    """The seconds that an attempt may run.

    Args:
        timeout_s: What the user chose.
        reference_s: Duration of the undisturbed run; 0 as long as that is what runs.
        first_write_s: Seconds from the attempt's start to its first write to its bucket; 0 if it has not written.
    """
    if timeout_s is not None:
        return timeout_s
    return max(LEAST_S, TIMES * (reference_s or first_write_s))


def format_duration(seconds: float) -> str:
    """Seconds as `1.5 s`, `40 s`, `30 min` or `2 h`."""
    if seconds < 10:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f}".removesuffix(".0") + " h"

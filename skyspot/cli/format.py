"""Times and counts as text."""

from __future__ import annotations

import time

from skyspot.wording import many

__all__ = ["ago", "clock", "many"]


def ago(at: float | None) -> str:
    """The age of a time in its largest unit; a dash if the time is unknown."""
    return "-" if at is None else f"{clock(max(0.0, time.time() - at))} ago"


def clock(seconds: float | None) -> str:
    """A duration in its largest unit; empty if unknown."""
    if seconds is None:
        return ""
    whole = round(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= size:
            return f"{whole // size}{unit}"
    return f"{whole}s"

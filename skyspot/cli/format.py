"""How times and counts are said."""

from __future__ import annotations

import time


def many(count: int, what: str) -> str:
    """`1 attempt`, `2 attempts`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def ago(at: float | None) -> str:
    """How long ago, in the largest unit; a dash where it is not known."""
    return "-" if at is None else f"{clock(max(0.0, time.time() - at))} ago"


def clock(seconds: float | None) -> str:
    """A duration in the largest unit; nothing where it is not known."""
    if seconds is None:
        return ""
    whole = round(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= size:
            return f"{whole // size}{unit}"
    return f"{whole}s"

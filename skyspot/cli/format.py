"""Times and counts as text."""

from __future__ import annotations

import time


def many(count: int, what: str) -> str:
    """`1 attempt`, `2 attempts`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """A duration in its two largest units: `2 h 36 min`, `41 min 10 s`, `12.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def printable(text: str) -> str:
    r"""Text on one line; what a terminal would obey or hide is escaped, as in Python: `\x1b`."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


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

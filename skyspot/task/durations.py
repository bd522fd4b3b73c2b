"""Durations as a user writes them."""

from __future__ import annotations

import re

from skyspot.errors import UsageError, shown

DURATION = re.compile(r"(\d{1,9}(?:\.\d+)?)([smhd]?)")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def read_duration(option: str, text: str) -> float:
    """The seconds of `90`, `90s`, `30m`, `1.5h` or `2d`.

    Raises:
        UsageError: it is no duration.
    """
    found = DURATION.fullmatch(text.strip())
    if not found or not float(found[1]):
        raise UsageError(f"{option}: {shown(text)} is not a duration, like 90s, 30m or 2h")
    return float(found[1]) * _UNITS[found[2] or "s"]

"""Ctrl-C pressed several times in a row: the person wants to leave at once."""

from __future__ import annotations

import time

PRESSES, PRESSES_S = 3, 2.0
"""So many times Ctrl-C within so many seconds ask to leave at once."""


class Presses:
    """Counts how often Ctrl-C was pressed of late."""

    def __init__(self) -> None:
        self._at: list[float] = []
        """When, on the monotonic clock."""

    def count(self) -> int:
        """Take in a press; returns how many there were within `PRESSES_S`."""
        now = time.monotonic()
        self._at = [*(press for press in self._at if now - press <= PRESSES_S), now]
        return len(self._at)

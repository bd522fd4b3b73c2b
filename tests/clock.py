"""A clock that a test sets; conftest.py has the fixture `clock`."""

import time

import pytest


class Clock:
    """A monotonic clock that a test sets: how fast the machine is does not matter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.added, self._start = 0.0, time.monotonic()
        monkeypatch.setattr(time, "monotonic", self._now)

    def _now(self) -> float:
        self.added += 1e-6  # Nothing takes no time at all.
        return self._start + self.added

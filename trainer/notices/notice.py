"""A notice: the announcement that this machine will be taken, as an attempt deals with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """An announcement that the machine will be taken."""

    kind: str
    """A key of `ending.STOPS`: `sigterm`, `sigint`, or a cloud's, as `aws-notice`."""
    id: str
    """Identifies the notice; for a signal, its kind."""
    at: float
    """When it was received, in monotonic seconds."""
    seconds_left: float
    """From `at` until the machine is taken."""

    @property
    def deadline(self) -> float:
        """When the machine is taken, in monotonic seconds."""
        return self.at + self.seconds_left

"""The time of an attempt's records, by the clock of its own machine. Clocks of two machines are never compared here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skyspot.runs.records import AttemptRecords, Line
from trainer.layout.events import YEAR_5000, number


@dataclass(frozen=True)
class Clock:
    """Seconds since an attempt's first record: by the monotonic clock if a record has it, else by the time of day."""

    first_time: float | None
    first_monotonic: float | None

    def at(self, fields: Mapping[str, Any]) -> float | None:
        """When a record was written, in seconds since the first one; None if it does not say."""
        monotonic, time = number(fields, "monotonic"), number(fields, "time", high=YEAR_5000)
        if monotonic is not None and self.first_monotonic is not None:
            return max(0.0, monotonic - self.first_monotonic)
        return max(0.0, time - self.first_time) if time is not None and self.first_time is not None else None

    def ended(self, line: Line) -> float | None:
        """When a step ended, in seconds since the first record; None if its line does not say."""
        if line.ended is None or self.first_monotonic is None:
            return None
        return max(0.0, line.ended - self.first_monotonic)


def clock_of(records: AttemptRecords) -> Clock:
    """The clock of an attempt, which begins with its first record: its start event, unless that is torn."""
    known = [event.fields for event in records.events if {"time", "monotonic"} & event.fields.keys()]
    first = known[0] if known else records.progress
    return Clock(number(first, "time", high=YEAR_5000), number(first, "monotonic"))

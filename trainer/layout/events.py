"""Records of an attempt: events, lines of metrics, progress. NaN and infinity in them are read as None."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.layout.documents import LayoutError, from_json, read_json
from trainer.layout.names import AttemptName, RunPaths, names_in

_EVENT = re.compile(r"(\d{4,9})-([a-z][a-z-]{0,31})\.json")
YEAR_5000 = 1e11
"""Unix seconds: the latest time that a record may have."""


@dataclass(frozen=True)
class Event:
    """One record of an attempt's life."""

    number: int
    name: str
    fields: Mapping[str, Any]


def read_events(
    paths: RunPaths, attempt: AttemptName, names: Collection[str] = (), *, all_of_them: bool = False
) -> list[Event]:
    """An attempt's events in order. Torn events are skipped: the machine was taken while they were written.

    Args:
        paths: The run's paths.
        attempt: The attempt.
        names: Read only events with these names, because each costs a request to the bucket. Empty: all.
        all_of_them: Fail on an event that cannot be read, instead of skipping it.

    Raises:
        LayoutError, OSError: `all_of_them` is set, and an event cannot be read.
    """
    events = []
    for name in names_in(paths.attempt(attempt)):
        match = _EVENT.fullmatch(name)
        if not match or (names and match[2] not in names):
            continue
        try:
            fields = read_json(paths.attempt(attempt) / name, allows_nan=True)
            events.append(Event(int(match[1]), match[2], fields))
        except (LayoutError, OSError):
            if all_of_them:
                raise
    return sorted(events, key=lambda event: (event.number, event.name))


def parse_event(file: str) -> tuple[int, str] | None:
    """(number, event) from the name of an event's file; None if the name is none."""
    found = _EVENT.fullmatch(file)
    return (int(found[1]), found[2]) if found else None


def last_event_number(paths: RunPaths, attempt: AttemptName) -> int:
    """The highest number of the attempt's events, torn ones included; 0 if there are none."""
    return max((int(match[1]) for match in map(_EVENT.fullmatch, names_in(paths.attempt(attempt))) if match), default=0)


def event_named(events: list[Event], name: str) -> Mapping[str, Any] | None:
    """The fields of the last event with that name; None if there is none."""
    return next((event.fields for event in reversed(events) if event.name == name), None)


def read_metrics(data: bytes) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, up to the first torn one."""
    for line in data.split(b"\n"):
        if not line:
            continue
        try:
            document = from_json(line, allows_nan=True)
        except LayoutError:
            return
        if isinstance(document, dict) and isinstance(document.get("step"), int):
            yield document


def read_progress(paths: RunPaths, attempt: AttemptName) -> dict[str, Any]:
    """The attempt's progress; empty if the file is missing or torn."""
    try:
        return read_json(paths.progress(attempt), allows_nan=True)
    except (LayoutError, OSError):
        return {}


def number(fields: Mapping[str, Any], key: str, low: float = 0.0, high: float = 1e9) -> float | None:
    """A number of a record, within bounds; None if it is missing or something else. Records are not trusted."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        return None
    return float(value) if math.isfinite(value) else None

"""Curve: the metrics of a run's steps, as trackers get them. The run's records are its source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.bucket.hashing import hash_bytes
from trainer.layout.events import event_named, read_events, read_metrics
from trainer.layout.names import AttemptName, RunPaths, is_safe_name

NOT_METRICS = frozenset({"step", "monotonic", "world_size"})
"""Numbers in a line of the records that are no metric."""


@dataclass(frozen=True)
class Point:
    """The metrics of a step, or a part of them: an evaluation after the step has a line of its own."""

    step: int
    values: dict[str, float]
    """By name. NaN: the step's value was not finite."""
    time: float | None = None
    """When the step ended, in unix seconds; None: now."""


def point(line: Mapping[str, Any], time: float | None = None) -> Point:
    """The point of a line of metrics. Text stays in the records; what was not finite is None there, and NaN here."""
    values = {}
    for name, value in line.items():
        if name not in NOT_METRICS and (value is None or isinstance(value, int | float)):
            values[name] = math.nan if value is None else value + 0  # A bool becomes a number.
    return Point(line["step"], values, time)


def recorded(paths: RunPaths, history: Iterable[Mapping[str, Any]], report: Callable[[str], None]) -> Iterator[Point]:
    """Yield the points of metrics files, in the order of steps.

    Args:
        paths: The run's.
        history: The metrics files up to a checkpoint, as its manifest lists them.
        report: Called with a line about a file that is not as it was written; its points are left out.

    Raises:
        OSError: the bucket cannot be read.
    """
    clocks: dict[str, float | None] = {}
    for part in history:
        name = str(part.get("path"))
        try:
            data = (paths.root / name).read_bytes() if is_safe_name(name) else b""
        except FileNotFoundError:
            data = b""
        if hash_bytes(data) != part.get("hash"):
            steps = f"steps {part.get('first_step')} to {part.get('last_step')}"
            report(f"{paths.root / name} is damaged: {steps} are missing")
            continue
        attempt = AttemptName.parse((paths.root / name).parent.name)
        if str(attempt) not in clocks:
            clocks[str(attempt)] = _clock(paths, attempt) if attempt else None
        begun = clocks[str(attempt)]
        for line in read_metrics(data):
            at = line.get("monotonic")
            yield point(line, begun + at if begun is not None and isinstance(at, int | float) else None)


def _clock(paths: RunPaths, attempt: AttemptName) -> float | None:
    """The unix time at which an attempt's monotonic clock was 0; None where its first event does not say."""
    start = event_named(read_events(paths, attempt, ("start",)), "start") or {}
    time, monotonic = start.get("time"), start.get("monotonic")
    return time - monotonic if isinstance(time, int | float) and isinstance(monotonic, int | float) else None

"""The measured speed of a run: the mean time of its newest steps."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from skyspot.runs import workers
from skyspot.runs.location import reading
from trainer.layout.events import read_metrics
from trainer.layout.names import RunPaths, list_attempts, list_metrics

MAX_FILES = 4
"""Metrics files that are read, the newest first; each costs a request to the bucket."""
MAX_STEPS = 1000


@dataclass(frozen=True)
class Speed:
    """The speed of a run."""

    step_s: float
    """Mean seconds of a step."""
    steps: int
    """The number of steps behind it."""


def measured_speed(paths: RunPaths) -> Speed | None:
    """The mean time of a run's newest steps, saves beside them included; None if no step is recorded.

    The first step of each attempt is left out where others are known: it compiles and warms up.

    Raises:
        UnreadableError: the bucket refused to be read, or did not answer.
    """
    return workers.call(paths.root, _speed, paths, seconds=workers.TIMEOUT_S)


def _speed(paths: RunPaths) -> Speed | None:
    later: list[float] = []
    first: list[float] = []
    with reading(paths):
        # Each attempt is listed when its files come up: a listing costs a request, too.
        files = (
            (at, path)
            for attempt in reversed(list_attempts(paths))
            for at, (_, path) in reversed([*enumerate(list_metrics(paths, attempt))])
        )
        for at, path in islice(files, MAX_FILES):
            times: list[float] = []
            with suppress(FileNotFoundError):
                lines = read_metrics(path.read_bytes())
                times = [float(line["step_s"]) for line in lines if _is_time(line.get("step_s"))]
            first += times[:1] if at == 0 else []
            later += times[1:] if at == 0 else times
            if len(later) >= MAX_STEPS:
                break
    known = later or first
    return Speed(sum(known) / len(known), len(known)) if known else None


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6

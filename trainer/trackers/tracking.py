"""Tracking: the trackers of an attempt, on rank 0."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from trainer.trackers import curve
from trainer.trackers.reporter import Reporter
from trainer.trackers.tracker import Tracked, Tracker

FINISHED_S = 60.0
"""The time that trackers have after the last step; a server may be slow to take it all."""
STOPPED_S = 5.0
"""The time that they have at any other end."""
SPARE_S = 2.0
"""What of a notice's time is left for the end of the process."""

_CLASSES = {"tensorboard": "TensorBoard", "wandb": "Wandb", "trackio": "Trackio"}
"""By the names in `TRACKERS` of the settings, which are those of our modules too."""


def make(name: str, run: Tracked) -> Tracker:
    """Return the tracker of that name."""
    made: Tracker = getattr(importlib.import_module(f"trainer.trackers.{name}"), _CLASSES[name])(run)
    return made


class Tracking:
    """Gives each tracker the curve of the run."""

    def __init__(
        self,
        names: Collection[str],
        run: Tracked,
        history: Iterable[Mapping[str, Any]],
        committed: Callable[[], int | None],
        print_line: Callable[[str], None],
    ) -> None:
        """Start the trackers, each on a thread of its own.

        Args:
            names: Those of the trackers.
            run: The run.
            history: The metrics files up to the step that was restored, as its manifest lists them.
            committed: Returns the last committed step.
            print_line: Prints a line.
        """
        files = list(history)

        def source(name: str) -> Callable[[], Iterator[curve.Point]]:
            return lambda: curve.recorded(run.paths, files, lambda line: print_line(f"{name}: {line}"))

        self._reporters = [Reporter(make(name, run), source(name), committed, print_line) for name in names]

    def line(self, metrics: Mapping[str, Any]) -> None:
        """Take a line of metrics; returns at once."""
        point = curve.point(metrics)
        for reporter in self._reporters:
            reporter.take(point)

    def end(self, is_finished: bool, deadline: float | None = None) -> list[str]:
        """End the trackers; returns the names of those that were not done in time.

        Args:
            is_finished: All steps are done and saved.
            deadline: When this machine is taken, in monotonic seconds, if that is known.
        """
        for reporter in self._reporters:
            reporter.end(is_finished)
        until = time.monotonic() + (FINISHED_S if is_finished else STOPPED_S)
        if deadline is not None:
            until = min(until, deadline - SPARE_S)
        return [one.tracker.name for one in self._reporters if not one.over.wait(max(0.0, until - time.monotonic()))]

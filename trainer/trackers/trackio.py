"""Trackio, on this machine, on a Hugging Face Space or on a server of one's own (TRACKIO_SPACE_ID, TRACKIO_SERVER_URL).

It takes the same step twice. So a step is logged once a later one is committed: none is done again, and each attempt
goes on behind the last step that the server has. On this machine its data base begins empty: each attempt logs the
whole curve again, and copies of the data base are put into the run's folder.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError
from trainer.layout.events import event_named, read_events
from trainer.layout.names import list_attempts
from trainer.machine import scratch
from trainer.trackers.curve import Point
from trainer.trackers.tracker import Snapshots, Tracked, free_accelerates_logger

FOLDER = "TRACKIO_DIR"
"""The variable that names the folder of its data bases; read when trackio is imported."""


class Trackio:
    """A `Tracker`."""

    name = "trackio"
    rewinds = False

    def __init__(self, run: Tracked) -> None:
        self._run = run
        self._project = os.environ.get("TRACKIO_PROJECT") or "skyspot"
        self._is_local = not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
        self._snapshots = Snapshots(run.paths.tracker(self.name), run.attempt)
        self._stack = ExitStack()
        self._local = Path()
        self._writer: Any = None
        """accelerate's tracker."""

    def start(self) -> int:
        """As of `Tracker.start`.

        Raises:
            TrainerError: the server does not say what it has.
        """
        free_accelerates_logger()
        self._local = self._stack.enter_context(scratch.folder(self.name))
        if FOLDER not in os.environ:
            os.environ[FOLDER] = str(self._local)
        from accelerate.tracking import TrackioTracker

        self._writer = TrackioTracker(
            self._project, name=self._run.id, resume="allow", embed=False, config=dict(self._run.config)
        )
        self._writer.start()
        first = int(self._writer.tracker._next_step)
        if not (first or self._is_local) and self._has_reported():
            raise TrainerError("the server does not say which steps it has")
        return first

    def _has_reported(self) -> bool:
        """An earlier attempt has reported to trackio."""
        for name in list_attempts(self._run.paths):
            if name != self._run.attempt:
                event = event_named(read_events(self._run.paths, name, ("tracking",)), "tracking") or {}
                if self.name in event.get("to", ()):
                    return True
        return False

    def where(self) -> str:
        """As of `Tracker.where`."""
        if self._is_local:
            return f"TRACKIO_DIR=FOLDER trackio show, with the newest folder of {self._run.paths.tracker(self.name)}"
        return f"project {self._project}, run {self._run.id}"

    def log(self, point: Point) -> None:
        """As of `Tracker.log`."""
        self._writer.tracker.log(point.values, step=point.step)  # Early releases of accelerate pass no step on.

    def publish(self) -> None:
        """As of `Tracker.publish`."""
        if not self._is_local:
            return
        from trackio.sqlite_storage import SQLiteStorage

        file = Path(SQLiteStorage.get_project_db_path(self._project))
        if file.exists():
            copy = self._local / f"copy-{file.name}"
            copy.unlink(missing_ok=True)
            with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(copy)) as target:
                source.backup(target)
            self._snapshots.add({file.name: copy})

    def finish(self, publish: bool) -> None:
        """As of `Tracker.finish`."""
        self._writer.finish()
        if publish:
            self.publish()
        self._stack.close()

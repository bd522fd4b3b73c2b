"""TensorBoard: event files in the run's folder.

An event file grows by appending, which mounts of object stores cannot do. So the events are written on this machine's
disk, and copied into the bucket in parts: each is a file of its own, written once. The first part of an attempt has the
whole curve so far, from the run's records, behind an event that has TensorBoard drop all that it has read before. So it
does not matter what earlier attempts have left there: steps beyond a checkpoint, torn files, or nothing.
"""

from __future__ import annotations

import re
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from trainer.layout.names import names_in
from trainer.machine import scratch
from trainer.trackers.curve import Point
from trainer.trackers.tracker import Tracked, copy_whole, free_accelerates_logger

_PART = re.compile(r"events\.out\.tfevents\.\d{9}\.\d{6}\.a\d{4,9}-[0-9a-f]{6}")


class TensorBoard:
    """A `Tracker`."""

    name = "tensorboard"
    rewinds = True

    def __init__(self, run: Tracked) -> None:
        self._run, self._folder = run, run.paths.tracker(self.name)
        self._stack = ExitStack()
        self._local = Path()
        self._parts = 0
        """Parts that were begun."""
        self._writer: Any = None
        """accelerate's tracker, which writes the part that is open."""
        self._closed: list[tuple[int, Path]] = []
        """Parts that are not in the bucket yet, with their numbers, oldest first."""

    def start(self) -> int:
        """As of `Tracker.start`."""
        free_accelerates_logger()
        self._local = self._stack.enter_context(scratch.folder(self.name))
        return 0

    def where(self) -> str:
        """As of `Tracker.where`."""
        return f"tensorboard --logdir {self._folder}"

    def log(self, point: Point) -> None:
        """As of `Tracker.log`."""
        if self._writer is None:
            self._writer = self._open()
        self._writer.log(point.values, step=point.step, walltime=point.time)

    def _open(self) -> Any:
        from accelerate.tracking import TensorBoardTracker

        self._parts += 1
        # Step 0 and all later ones are dropped by what reads the file.
        purge = {"purge_step": 0} if self._parts == 1 else {}
        writer = TensorBoardTracker(str(self._parts), self._local, **purge)
        writer.main_process_only = False  # Only rank 0 is here. Else it would make the program's PartialState.
        writer.start()
        return writer

    def publish(self) -> None:
        """As of `Tracker.publish`."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.finish()
            [file] = (self._local / str(self._parts)).iterdir()
            self._closed.append((self._parts, file))
        while self._closed:
            number, file = self._closed[0]
            attempt = self._run.attempt
            name = f"events.out.tfevents.{attempt.number:09d}.{number:06d}.{attempt}"
            copy_whole(file, self._folder / name)
            self._closed.pop(0)
            file.unlink()
            if number == 1:
                self._delete_before(name)

    def _delete_before(self, name: str) -> None:
        """Delete the parts of earlier attempts."""
        for other in names_in(self._folder):
            if _PART.fullmatch(other) and other < name:
                with suppress(OSError):
                    (self._folder / other).unlink()

    def finish(self, publish: bool) -> None:
        """As of `Tracker.finish`."""
        if publish:
            self.publish()
        self._stack.close()
